"""The tokens that all rows of a batch begin with, as those of a chat template: read once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wisecli.models.prompts.tokenization import SHARED, Batch, Row, collate

if TYPE_CHECKING:
    from transformers import DynamicCache

# Below so many tokens that need not be read, reading the beginning by itself takes longer than it spares.
_WORTH = 64
# So many beginnings are kept; batches that begin alike come one after the other.
_KEPT = 8


@dataclass(frozen=True)
class Prefix:
    """What was read of P tokens that rows share: each layer's keys and values, and ``given`` (1, P, n) by the pass."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    given: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """P."""
        return self.layers[0][0].shape[2]

    def cache(self, batch: Batch) -> DynamicCache:
        """Return the columns of a batch before column P, as a pass over those from P on finds them.

        A row of n columns of padding has the first P - n tokens there, and its pass reads the last n of them anew: so
        columns stay what they are without a beginning.
        """
        position = self._places(batch)
        cache = empty_cache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(_spread(keys, position), _spread(values, position), layer)
        return cache

    def before(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the pass's other outputs at the columns of a batch before column P: (B, P, n)."""
        position = self._places(batch)
        return tuple(each[0][position] for each in self.given)

    def _places(self, batch: Batch) -> Tensor:
        """Return which of the tokens stands in each column before P (B, P); padding counts as the first."""
        position = torch.arange(self.length, device=batch.mask.device) - _padding(batch)[:, None]
        return position.clamp(min=0)


class PrefixCache:
    """The beginnings of batches, one after the other; each is read when it is first met, and the latest are kept.

    ``read`` runs the layers that are wanted over a batch, fills the cache, and gives what else is kept.
    """

    def __init__(self, read: Callable[[Batch, DynamicCache], tuple[Tensor, ...]]) -> None:
        self._read, self._known = read, dict[tuple[int, ...], Prefix]()

    def prefix_of(self, batch: Batch) -> Prefix | None:
        """Return what all rows of a batch begin with; ``None`` where it is not worth the while."""
        tokens = _common_prefix(batch)
        if tokens not in self._known:
            if len(tokens) < SHARED or len(tokens) * (len(batch.ids) - 1) < _WORTH:
                return None
            cache = empty_cache()
            given = self._read(collate([Row(tokens, ())]).to(batch.ids.device), cache)
            layers = tuple(tensors_of(layer) for layer in cache.layers)
            if len(self._known) == _KEPT:
                del self._known[next(iter(self._known))]
            self._known[tokens] = Prefix(layers, given)
        return self._known[tokens]


def empty_cache() -> DynamicCache:
    """Return an attention cache that holds nothing yet."""
    from transformers import DynamicCache

    return DynamicCache()


def tensors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and values that one layer of a cache holds."""
    return layer.keys, layer.values


def _common_prefix(batch: Batch) -> tuple[int, ...]:
    """Return the tokens that all rows begin with; the last token of a prompt is never one of them."""
    padding = _padding(batch)
    most = batch.start - int(padding.max())
    places = padding[:, None] + torch.arange(most, device=padding.device)
    first = batch.ids.gather(1, places)
    same = (first == first[:1]).all(0).long().cumprod(0)
    return tuple(first[0, : int(same.sum())].tolist())


def _padding(batch: Batch) -> Tensor:
    """Return how many columns (B,) stand before each row's first token."""
    return batch.mask.argmax(-1)


def _spread(read: Tensor, position: Tensor) -> Tensor:
    """Return what (1, heads, P, d_head) holds at places (B, P'): (B, heads, P', d_head)."""
    return read[0][:, position].transpose(0, 1)
