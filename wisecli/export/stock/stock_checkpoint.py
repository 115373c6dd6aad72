"""Checkpoints of a stock architecture with the gate inside: no custom code, and nothing but decoder blocks.

After the edited layer stand one or more decoder blocks of the model's own kind whose attention adds nothing and whose
feed-forward is the memory. With ``u`` the RMS-normed state that leaves the edited layer, a key of direction ``w``,
offset ``b`` and residual ``v`` is a pair of neurons whose outputs are added with opposite signs::

    (silu(w·u + b) - silu(w·u + b - WIDTH)) · v / WIDTH

which is 0 well below its threshold and ``v`` well above it. Everything else is the base model's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from wisecli.artifacts.file_names import MEMORY_TENSORS
from wisecli.errors import ModelError
from wisecli.export.routed.checkpoint import BASE_TENSORS, copy_side_files, typed_config, write_index
from wisecli.export.stock.stock_manifest import VALUE_MATRIX, layers_path, moved, value_matrix
from wisecli.export.weights import Packing, write_renamed
from wisecli.io.checkpoint import Checkpoint, read_json, save_tensors, write_json
from wisecli.models.layout.site import Site

# From nothing to all of a residual, in units of what a neuron reads.
WIDTH = 20.0
# Architectures that are Llama's, and those that can be written as such.
_OWN, _AS_LLAMA = ("llama", "granite"), ("mistral", "qwen2")
_CLASSES = {"llama": "LlamaForCausalLM", "granite": "GraniteForCausalLM"}
# Settings of other architectures that Llama does not have.
_FOREIGN = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias")
# What a config may leave to its architecture, and must not once it is Llama's.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("rms_norm_eps", "max_position_embeddings", "vocab_size", "tie_word_embeddings", "attention_dropout"),
    *("rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_SMALL = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Gate:
    """A memory as gated residuals: ``directions`` (n, d), ``offsets`` (n,) and ``values`` (n, d), in float32.

    The reading ``directions · u + offsets`` of a normed state ``u`` opens a key at ``WIDTH / 2`` by half.
    """

    directions: Tensor
    offsets: Tensor
    values: Tensor

    def readings(self, states: Tensor) -> Tensor:
        """Return what the neurons read of normed states (..., d): (..., n)."""
        return F.linear(states, self.directions, self.offsets)

    def update(self, states: Tensor) -> Tensor:
        """Return what is added to the stream at normed states (..., d): (..., d)."""
        readings = self.readings(states)
        return ((F.silu(readings) - F.silu(readings - WIDTH)) / WIDTH) @ self.values


def require_stock(base: Path, site: Site) -> None:
    """Check that a base model can be written with its memory as blocks of a stock architecture.

    Raises:
        ModelError: it cannot, naming why and what can be written instead.
    """
    if reason := _unfit(base, site):
        merged = ", or merge with --mode merge for --format merged" if site.has_matrix else ""
        raise ModelError(f"{base} cannot be written as stock: {reason}; use --format routed{merged}")


def _unfit(base: Path, site: Site) -> str:
    """Return why a base model has no stock architecture that holds a memory; empty if it has one."""
    config = read_json(base / "config.json")
    kind = str(config.get("model_type"))[:80]
    if kind not in (*_OWN, *_AS_LLAMA):
        return f"{kind} is not Llama's architecture, and none that can be written as such"
    settings = AutoConfig.from_pretrained(base, local_files_only=True)  # nosec B615 # of files of this disk
    if config.get("quantization_config") is not None:
        return "its weights are quantized"
    slides = (
        settings.sliding_window is not None if kind == "mistral" else kind == "qwen2" and settings.use_sliding_window
    )
    if slides:
        return "its attention slides over a window, which Llama's does not"
    if settings.hidden_act not in ("silu", "swish"):
        return f"its feed-forward has {settings.hidden_act} where the gate needs SiLU"
    if site.has_matrix and site.module != value_matrix(site):
        return f"{site.module} is not the last matrix of a Llama feed-forward"
    return ""


def capacity(base: Path) -> int:
    """Return how many keys a block holds."""
    settings = AutoConfig.from_pretrained(base, local_files_only=True)  # nosec B615 # of files of this disk
    return int(settings.intermediate_size) // 2


def block_count(keys: int, base: Path) -> int:
    """Return how many blocks so many keys take."""
    return max(1, -(-keys // capacity(base)))


def write_stock(
    output: Path, base: Path, checkpoint: Checkpoint, site: Site, gate: Gate, packing: Packing | None = None
) -> None:
    """Write a stock checkpoint into an empty directory; its layers above the edited one move up.

    Raises:
        ModelError: the checkpoint's weights go by other names than Llama's.
    """
    packing = packing or Packing()
    layers, count = layers_path(checkpoint, site), block_count(len(gate.values), base)
    rename = partial(moved, layers=layers, after=site.layer, by=count)
    single = BASE_TENSORS
    files = write_renamed(output, checkpoint, packing, rename, single=single)
    config = stock_config(base, site.layer, count, packing)
    written = packing.dtype or checkpoint.dtype(f"{layers}.{site.layer}.{VALUE_MATRIX}.weight")
    # Granite multiplies what a block's feed-forward adds; a residual behind a layer is added as it is.
    multiplier = float(config.get("residual_multiplier", 1.0))
    gate = replace(gate, values=gate.values * (site.multiplier / multiplier))
    added = {name: tensor.to(written) for name, tensor in _blocks(config, layers, site.layer, gate, count)}
    added |= {name: tensor.to(written) for name, tensor in _no_biases(config, layers) if name not in files | added}
    save_tensors(output / MEMORY_TENSORS, added)
    write_index(output, {**files, **dict.fromkeys(added, MEMORY_TENSORS)})
    write_json(output / "config.json", config)
    copy_side_files(output, base)


def stock_config(base: Path, layer: int, blocks: int, packing: Packing) -> dict[str, Any]:
    """Return the config of the checkpoint: so many blocks more, and biases in every feed-forward.

    Args:
        layer: the number of the edited layer.
    """
    config = typed_config(read_json(base / "config.json"), packing)
    kind = str(config["model_type"])
    depth = int(config["num_hidden_layers"])
    if kind in _AS_LLAMA:
        settings = AutoConfig.from_pretrained(base, local_files_only=True)  # nosec B615 # of files of this disk
        for name in _SIZES:
            if name not in config and getattr(settings, name, None) is not None:
                config[name] = getattr(settings, name)
        config = {name: value for name, value in config.items() if name not in _FOREIGN}
        config["attention_bias"] = kind == "qwen2"
        kind = "llama"
    if isinstance(types := config.get("layer_types"), list):
        config["layer_types"] = [*types[: layer + 1], *["full_attention"] * blocks, *types[layer + 1 :]]
    config.pop("auto_map", None)
    return {
        **config,
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "num_hidden_layers": depth + blocks,
        "mlp_bias": True,
    }


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a decoder block: of the stream, of the feed-forward, of all queries, and of keys or values."""

    hidden: int
    width: int
    queries: int
    shared: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> _Sizes:
        """As a config says them."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        shared = int(config.get("num_key_value_heads") or heads) * size
        return cls(hidden, int(config["intermediate_size"]), heads * size, shared)


def _blocks(config: dict[str, Any], layers: str, layer: int, gate: Gate, count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the memory's blocks, in float32."""
    sizes = _Sizes.of(config)
    hidden, width, room = sizes.hidden, sizes.width, sizes.width // 2
    for block in range(count):
        layer_path = f"{layers}.{layer + 1 + block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer_path}.{norm}.weight", torch.ones(hidden)
        shapes = {
            "q": (sizes.queries, hidden),
            "k": (sizes.shared, hidden),
            "v": (sizes.shared, hidden),
            "o": (hidden, sizes.queries),
        }
        for letter, shape in shapes.items():
            yield f"{layer_path}.self_attn.{letter}_proj.weight", torch.zeros(shape)
        chosen = slice(block * room, (block + 1) * room)
        for name, tensor in _neurons(gate, chosen, hidden, width).items():
            yield f"{layer_path}.mlp.{name}", tensor


def _neurons(gate: Gate, chosen: slice, hidden: int, width: int) -> dict[str, Tensor]:
    """Return a feed-forward of ``width`` neurons that holds some of a gate's keys."""
    directions, offsets, values = (part[chosen].float() for part in (gate.directions, gate.offsets, gate.values))
    used = 2 * len(values)
    reads, reads_from, adds = torch.zeros(width, hidden), torch.zeros(width), torch.zeros(hidden, width)
    reads[0:used:2], reads[1:used:2] = directions, directions
    reads_from[0:used:2], reads_from[1:used:2] = offsets, offsets - WIDTH
    adds[:, 0:used:2], adds[:, 1:used:2] = values.T / WIDTH, -values.T / WIDTH
    passes = torch.zeros(width)
    passes[:used] = 1
    return {
        "gate_proj.weight": reads,
        "gate_proj.bias": reads_from,
        "up_proj.weight": torch.zeros(width, hidden),
        "up_proj.bias": passes,
        "down_proj.weight": adds,
        "down_proj.bias": torch.zeros(hidden),
    }


def _no_biases(config: dict[str, Any], layers: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a bias of nought for every one that the config asks for."""
    sizes = _Sizes.of(config)
    biases = dict(zip((f"mlp.{name}" for name in _SMALL), (sizes.width, sizes.width, sizes.hidden), strict=True))
    if config.get("attention_bias"):
        lengths = (sizes.queries, sizes.shared, sizes.shared, sizes.hidden)
        biases |= {f"self_attn.{letter}_proj": length for letter, length in zip("qkvo", lengths, strict=True)}
    for number in range(int(config["num_hidden_layers"])):
        for name, length in biases.items():
            yield f"{layers}.{number}.{name}.bias", torch.zeros(length)
