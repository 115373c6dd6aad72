"""Modules that do something else for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def overridden(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward pass of each layer within a ``with`` block."""
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


def giving(layers: Iterable[nn.Module], states: Tensor, width: int) -> AbstractContextManager[None]:
    """Return a context in which layers output given states, as the first of a tuple of ``width`` if that is not 0."""
    output = (states, *[None] * (width - 1)) if width else states
    return overridden(layers, lambda *_, **__: output)


@contextmanager
def hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove the hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
