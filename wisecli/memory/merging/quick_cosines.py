"""Cosines in whole numbers of one byte, where the processor multiplies those several times as fast as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.environment import has_quick_int8

# Vectors are rounded to whole numbers from minus this to this: two products of larger ones, added up as AVX2 does it,
# would overflow.
_LARGEST = 78
# How many times its root mean square a number of a vector is at most.
_FURTHEST = 7.0
# Vectors that are rounded at a time, and cosines that are held: those stay near the core.
_ROWS, _AT_A_TIME = 1 << 12, 1 << 20


@dataclass(frozen=True)
class QuickVectors:
    """Vectors of length 1, ``values`` (n, k) times ``unit``; the cosine of two is off by .003 on average."""

    values: Tensor
    unit: float

    @property
    def few_bits(self) -> bool:
        """Whether the vectors are rounded to bytes."""
        return self.values.dtype == torch.int8

    @classmethod
    def of(cls, vectors: Tensor) -> QuickVectors:
        """Return vectors (n, k) in the form that this processor multiplies fastest."""
        if not has_quick_int8():
            return cls(vectors.float(), 1.0)
        # A fixed unit, so that a cosine does not depend on which vectors are compared together.
        unit = min(1.0, _FURTHEST / vectors.shape[1] ** 0.5) / _LARGEST
        values = torch.empty(vectors.shape, dtype=torch.int8)
        for part, out in zip(vectors.split(_ROWS), values.split(_ROWS), strict=True):
            out.copy_((part.float() / unit).round_().clamp_(-_LARGEST, _LARGEST))
        return cls(values, unit)

    def rows(self, chosen: Tensor | slice) -> QuickVectors:
        """Return some of the vectors (m,)."""
        values = self.values
        if isinstance(chosen, slice):
            return replace(self, values=values[chosen])
        if self.few_bits and values.shape[1] % 8 == 0:  # eight bytes are gathered at once
            return replace(self, values=values.view(torch.int64).index_select(0, chosen).view(torch.int8))
        return replace(self, values=values.index_select(0, chosen))

    def cosines(self, others: QuickVectors) -> tuple[Tensor, float]:
        """Return cosines with others (m, k), up to a factor, and that factor: (n, m)."""
        if not self.few_bits:
            return self.values @ others.values.T, 1.0
        return torch._int_mm(self.values, others.values.T), self.unit * others.unit


def highest_in_parts(kept: QuickVectors, columns: QuickVectors, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the kept vectors, each with their highest cosines with the tokens of each prompt (m, B), at least
    zero.

    Args:
        columns: the tokens of prompts (W · B): the first tokens of all prompts, then the second, and so on.
        count: how many prompts there are, B.
    """
    size, end = -(-_AT_A_TIME // max(1, len(columns.values))), len(kept.values)
    for first in range(0, end, size):
        rows = slice(first, min(first + size, end))
        cosines, unit = kept.rows(rows).cosines(columns)
        yield rows, cosines.view(len(cosines), -1, count).amax(1).clamp(min=0) * unit
