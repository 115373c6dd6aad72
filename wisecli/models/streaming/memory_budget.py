"""What a model takes in memory, from file headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.io.safetensors_header import TensorLayout, item_bytes, read_header
from wisecli.models.layout.architectures import computed_in, layer_count, spellings

if TYPE_CHECKING:
    import torch

# The interpreter with torch and transformers, in bytes.
LIBRARIES = 700 << 20
# Bytes that a tokenizer takes for each of its file.
_TOKENIZER = 16
# A model is held whole if its weights leave this share of the budget to activations, statistics and the libraries.
_LEFT = 0.25
# The share of the budget that a sweep may keep in memory of what it carries from layer to layer.
_SPOOLED = 0.125
# The share of what weights leave of it that experts may take which are kept to be asked again.
_KEPT = 0.5
# Experts that there are at a time while one is read: its tensors, what is made of them, and the last one.
_IN_HAND = 3


# How many numbers the experts of each layer have, and one of them, where they are read one by one; else empty.
Experts = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in the type that it is run in: without its layers, of each layer, of those of its experts that
    are read one by one, and of one of them; and bytes a weight.
    """

    resident: int
    layers: tuple[int, ...]
    item: int
    experts: tuple[int, ...]
    expert: int

    @property
    def dense(self) -> tuple[int, ...]:
        """Bytes of each layer without those experts."""
        return tuple(whole - experts for whole, experts in zip(self.layers, self.experts, strict=True))

    @property
    def weights(self) -> int:
        """Bytes of the whole model."""
        return self.resident + sum(self.layers)


def sizes(checkpoint: Checkpoint, layers: str, dtype: torch.dtype | str = "auto", experts: Experts = ()) -> Sizes:
    """Return the sizes of a model from its headers.

    Args:
        layers: module path of the list of layers.
        dtype: what it is run in; ``auto`` is the checkpoint's own.
        experts: of its layers.
    """
    each, rest = [0] * layer_count(checkpoint.directory), 0
    own = _itemsize(checkpoint, dtype)
    layouts = _layouts(checkpoint)
    starts = list(spellings(f"{layers}."))
    for name, layout in layouts.items():
        number = next((name.removeprefix(start).partition(".")[0] for start in starts if name.startswith(start)), "")
        size = math.prod(layout.shape) * own if own else layout.bytes
        if number.isdecimal() and int(number) < len(each):
            each[int(number)] += size
        else:
            rest += size
    widest = max(layout.bytes // max(math.prod(layout.shape), 1) for layout in layouts.values())
    item, counted = own or widest, experts or [(0, 0)] * len(each)
    apart = tuple(min(size, item * count) for size, (count, _) in zip(each, counted, strict=True))
    return Sizes(rest, tuple(each), item, apart, item * max(one for _, one in counted))


def libraries(directory: Path) -> int:
    """Return the bytes that the interpreter takes with torch, transformers and a model's tokenizer."""
    tokenizer = directory / "tokenizer.json"
    return LIBRARIES + _TOKENIZER * (tokenizer.stat().st_size if tokenizer.is_file() else 0)


def spool_bytes(checkpoint: Checkpoint, dtype: torch.dtype | str, memory_budget: int) -> int | None:
    """Return what a sweep may keep in memory; ``None`` if the whole model fits and nothing is to be streamed."""
    own = _itemsize(checkpoint, dtype)
    layouts = _layouts(checkpoint).values()
    weights = sum(math.prod(layout.shape) * own if own else layout.bytes for layout in layouts)
    return None if weights <= (1 - _LEFT) * memory_budget else spool_share(memory_budget)


def spool_share(memory_budget: int) -> int:
    """Return what a sweep may keep in memory where layers are streamed."""
    return round(_SPOOLED * memory_budget)


def in_hand(expert: int) -> int:
    """Return the bytes that experts take which pass through one by one.

    Args:
        expert: bytes of one.
    """
    return _IN_HAND * expert


def expert_rooms(memory_budget: int, weights: int, largest: int) -> tuple[int, int]:
    """Return the bytes of experts that may stay: of the layer that runs, until it has, and of those that are held.

    Args:
        weights: bytes of all else that is held of the model.
        largest: bytes of all experts of a layer.
    """
    room = max(0, round(_KEPT * (memory_budget - LIBRARIES - weights)))
    passing = min(largest, room // 2)
    return passing, room - passing


def _layouts(checkpoint: Checkpoint) -> dict[str, TensorLayout]:
    return {name: layout for path in checkpoint.files for name, layout in read_header(path).tensors.items()}


def _itemsize(checkpoint: Checkpoint, dtype: torch.dtype | str) -> int | None:
    """Return the bytes a weight takes once it is loaded; ``None`` where that is as it is stored."""
    if dtype == "auto":
        config = read_json(checkpoint.directory / "config.json")
        dtype = computed_in(checkpoint) or str(config.get("dtype") or config.get("torch_dtype"))
    return item_bytes(str(dtype).removeprefix("torch."))
