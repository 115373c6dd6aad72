"""Modules that do something else for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def overridden(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let each of the layers do something else for a while."""
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer, _ in replaced:
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, own in replaced:
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own


@contextmanager
def hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove the hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
