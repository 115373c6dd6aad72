"""Decoder blocks of random numbers for a stream with extra channels, and what they compute in plain torch."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from wisecli.export.stock.checkpoint.decoder_block import DecoderBlock


def random_block(config: Any, width: int, *, seed: int = 0, reads: bool = True, scale: float = 0.3) -> DecoderBlock:
    """A block whose queries are constant, whose keys and values are of the extra channels, and with a feed-forward.

    Args:
        config: the base model's.
        reads: whether its attention adds anything.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    queries, shared = heads * size, config.num_key_value_heads * size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    attention = {
        "self_attn.q_proj.bias": drawn(queries) * 5 / scale,
        "self_attn.k_proj.weight": F.pad(drawn(shared, width - hidden), (hidden, 0)),
        "self_attn.v_proj.weight": F.pad(drawn(shared, width - hidden) * 3, (hidden, 0)),
        "self_attn.v_proj.bias": drawn(shared),
        "self_attn.o_proj.weight": drawn(width, queries) * 3,
        "self_attn.o_proj.bias": drawn(width),
    }
    feed_forward = {
        "mlp.gate_proj.weight": drawn(inner, width),
        "mlp.gate_proj.bias": drawn(inner),
        "mlp.up_proj.weight": drawn(inner, width),
        "mlp.down_proj.weight": drawn(width, inner),
        "mlp.down_proj.bias": drawn(width),
        "post_attention_layernorm.weight": 1 + drawn(width),
    }
    return DecoderBlock({**(attention if reads else {}), **feed_forward})


def computed(block: DecoderBlock, states: Tensor, config: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """What leaves a block, of states (T, D) that enter it.

    Args:
        config: the base model's; what it multiplies residuals by counts for nothing.
        rotary: cosines and sines, each (1, T, head size).
    """
    tensors, heads = block.tensors, config.num_attention_heads
    share = config.hidden_size / states.shape[1]

    def normed(given: Tensor, name: str) -> Tensor:
        weight = torch.ones(given.shape[1])
        weight[: config.hidden_size] = share**0.5
        mean = given.square().mean(-1, keepdim=True)
        return given / (mean + config.rms_norm_eps * share).sqrt() * tensors.get(f"{name}.weight", weight)

    if "self_attn.o_proj.weight" in tensors:
        read = normed(states, "input_layernorm")
        queries = tensors["self_attn.q_proj.bias"].expand(len(states), -1)
        keys = read @ tensors["self_attn.k_proj.weight"].T
        values = read @ tensors["self_attn.v_proj.weight"].T + tensors["self_attn.v_proj.bias"]
        mixed = _attended((queries, keys, values), heads, config, rotary)
        states = states + mixed @ tensors["self_attn.o_proj.weight"].T + tensors["self_attn.o_proj.bias"]
    read = normed(states, "post_attention_layernorm")
    opened = F.silu(read @ tensors["mlp.gate_proj.weight"].T + tensors["mlp.gate_proj.bias"])
    inner = opened * (read @ tensors["mlp.up_proj.weight"].T)
    return states + inner @ tensors["mlp.down_proj.weight"].T + tensors["mlp.down_proj.bias"]


def _attended(
    projected: tuple[Tensor, Tensor, Tensor], heads: int, config: Any, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Values of earlier places by how keys meet queries: (T, all heads)."""
    size = projected[0].shape[1] // heads
    queries, keys, values = (one.reshape(1, len(one), -1, size).transpose(1, 2) for one in projected)
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
    factor = getattr(config, "attention_multiplier", size**-0.5)
    rows = []
    for head in range(heads):
        own = head // (heads // config.num_key_value_heads)
        for place in range(queries.shape[2]):
            scores = keys[0, own, : place + 1] @ queries[0, head, place] * factor
            rows.append(scores.softmax(0) @ values[0, own, : place + 1])
    return torch.stack(rows).reshape(heads, -1, size).transpose(0, 1).flatten(1)


def tensors_by_name(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
