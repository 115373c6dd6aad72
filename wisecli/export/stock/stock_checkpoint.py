"""Checkpoints of a stock architecture with a memory inside: no custom code, and nothing but decoder blocks.

Behind the layer that a router reads and behind the last one stand decoder blocks of the model's own kind, and the
residual stream may have more channels than the base model's, which only those blocks use. Everything else is the base
model's, bit for bit unless the stream is wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.artifacts.file_names import MEMORY_TENSORS
from wisecli.errors import ModelError
from wisecli.export.routed.checkpoint import BASE_TENSORS, copy_side_files, typed_config, write_index
from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks, LayerSizes
from wisecli.export.stock.checkpoint.widening import Widening
from wisecli.export.stock.stock_manifest import VALUE_MATRIX, layers_path, memory_blocks, moved, value_matrix
from wisecli.export.weights import Packing, write_renamed
from wisecli.io.checkpoint import Checkpoint, read_json, save_tensors, write_json
from wisecli.models.layout.architectures import class_config
from wisecli.models.layout.site import Site

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
    settings = class_config(base)
    if config.get("quantization_config") is not None:
        return "its weights are quantized"
    slides = (
        settings.sliding_window is not None if kind == "mistral" else kind == "qwen2" and settings.use_sliding_window
    )
    if slides:
        return "its attention slides over a window, which Llama's does not"
    if settings.hidden_act not in ("silu", "swish"):
        return f"its feed-forward has {settings.hidden_act} where the router needs SiLU"
    if site.has_matrix and site.module != value_matrix(site):
        return f"{site.module} is not the last matrix of a Llama feed-forward"
    return ""


def base_settings(base: Path) -> dict[str, Any]:
    """Return a base model's settings, with what its ``config.json`` leaves to the architecture."""
    found: dict[str, Any] = class_config(base).to_dict()
    return found


def write_stock(
    output: Path,
    base: Path,
    checkpoint: Checkpoint,
    site: Site,
    blocks: AddedBlocks,
    extra: int = 0,
    packing: Packing | None = None,
) -> list[int]:
    """Write a stock checkpoint and return the numbers of the added blocks; layers above the router's move up.

    Args:
        blocks: what is added, with tensors as wide as the stream then is.
        extra: how many channels the stream gets at least; see `Widening.of`.

    Raises:
        ModelError: the checkpoint's weights go by other names than Llama's.
        ValueError: a block has a tensor that no layer has, or of another shape.
    """
    packing = packing or Packing()
    widening = Widening.of(base_settings(base), extra)
    layers = layers_path(checkpoint, site)
    config = stock_config(base, site.layer, blocks, packing, widening)
    sizes, every = LayerSizes.of(config), [*blocks.behind, *blocks.last]
    for block in every:
        block.require(sizes)
    rename = partial(moved, layers=layers, after=site.layer, by=len(blocks.behind))
    single = BASE_TENSORS
    files = write_renamed(output, checkpoint, packing, rename, single=single, transform=widening)
    written = packing.dtype or checkpoint.dtype(f"{layers}.{site.layer}.{VALUE_MATRIX}.weight")
    # Granite multiplies what a block adds, and blocks say what is to be added.
    multiplier = float(config.get("residual_multiplier", 1.0))
    added: dict[str, Tensor] = {}
    numbers = memory_blocks(site.layer, int(config["num_hidden_layers"]), len(every), len(blocks.last))
    for number, block in zip(numbers, every, strict=True):
        tensors = block.written(sizes, widening, multiplier, written)
        added |= {f"{layers}.{number}.{name}": tensor for name, tensor in tensors}
    added |= {name: tensor.to(written) for name, tensor in _no_biases(config, layers) if name not in files | added}
    save_tensors(output / MEMORY_TENSORS, added)
    write_index(output, {**files, **dict.fromkeys(added, MEMORY_TENSORS)})
    write_json(output / "config.json", config)
    copy_side_files(output, base)
    return numbers


def stock_config(base: Path, layer: int, blocks: AddedBlocks, packing: Packing, widening: Widening) -> dict[str, Any]:
    """Return the config of the checkpoint: those blocks more, biases in every feed-forward, and a stream that wide.

    Args:
        layer: the number of the router's layer.
    """
    config = typed_config(read_json(base / "config.json"), packing)
    kind = str(config["model_type"])
    depth, settings = int(config["num_hidden_layers"]), class_config(base)
    if kind in _AS_LLAMA:
        for name in _SIZES:
            if name not in config and getattr(settings, name, None) is not None:
                config[name] = getattr(settings, name)
        config = {name: value for name, value in config.items() if name not in _FOREIGN}
        config["attention_bias"] = kind == "qwen2"
        kind = "llama"
    if isinstance(types := config.get("layer_types"), list):
        behind, last = (["full_attention"] * len(group) for group in blocks)
        config["layer_types"] = [*types[: layer + 1], *behind, *types[layer + 1 :], *last]
    config.pop("auto_map", None)
    if any(block.attention_bias for group in blocks for block in group):
        config["attention_bias"] = True
    return {
        **config,
        **(_wider(settings.to_dict(), widening) if widening.changes else {}),
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "num_hidden_layers": depth + len(blocks.behind) + len(blocks.last),
        "mlp_bias": True,
    }


def _wider(settings: Mapping[str, Any], widening: Widening) -> dict[str, Any]:
    """Return what a config says of a wider stream; heads are no longer as large as the stream divided by them."""
    return {
        "hidden_size": widening.width,
        "head_dim": settings.get("head_dim") or widening.hidden // int(settings["num_attention_heads"]),
        "rms_norm_eps": float(settings["rms_norm_eps"]) * widening.share,
    }


def _no_biases(config: Mapping[str, Any], layers: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a bias of zero for every one that the config asks for."""
    biases = LayerSizes.of(config).biases
    for number in range(int(config["num_hidden_layers"])):
        for name, shape in biases.items():
            yield f"{layers}.{number}.{name}", torch.zeros(shape)
