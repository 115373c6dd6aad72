"""The closed form: the change of a matrix that adds given residuals at given keys, and little elsewhere.

    Δ = Δ₀ + argmin_X  ‖K(Δ₀ + X)ᵀ - V‖² / n  +  w · e · tr(X Z Xᵀ)  +  λ · e · ‖X‖²

K (n, d_ff) are the edits' keys, V (n, d) the residuals that ``Δ`` should add there, Z the second moment of unrelated
keys at mean eigenvalue 1, e the mean energy of the edits' keys per coordinate. Only ``KᵀK`` and ``KᵀV`` enter, and both
add up over edits: the sum of two shards' statistics solves for all their edits at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """``KᵀK`` (d_ff, d_ff), ``KᵀV`` (d_ff, d), both in float64, and the number of keys."""

    gram: Tensor
    cross: Tensor
    count: int

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.gram + other.gram, self.cross + other.cross, self.count + other.count)


@dataclass(frozen=True)
class Penalty:
    """λ and w of the closed form."""

    ridge: float
    unrelated: float


# Tried in this order, the heaviest first: of equally good ones the heaviest disturbs other text least.
PENALTIES = tuple(Penalty(ridge, weight) for ridge in (1e-1, 1e-2, 1e-3, 1e-4) for weight in (1e-1, 1e-2, 0.0))


def statistics(keys: Tensor, residuals: Tensor) -> Statistics:
    """Return the sufficient statistics of keys (n, d_ff) and residuals (n, d)."""
    wide = keys.double()
    return Statistics(wide.T @ wide, wide.T @ residuals.double(), len(keys))


def solve(
    known: Statistics,
    penalty: Penalty,
    unrelated: Tensor,
    *,
    columns: Tensor | None = None,
    around: Tensor | None = None,
) -> Tensor:
    """Return ``Δ`` (d, d_ff), or its part (d, k) on some columns, by Cholesky in float64.

    Args:
        unrelated: second moment of unrelated keys (d_ff, d_ff), of any scale.
        columns: input coordinates (k,) that ``Δ`` may use; all by default.
        around: ``Δ₀``, of the same shape as the result; zero by default.
    """
    gram, cross, moment = known.gram, known.cross, unrelated
    if columns is not None:
        gram, cross, moment = gram[columns][:, columns], cross[columns], moment[columns][:, columns]
    gram, cross = gram / max(known.count, 1), cross / max(known.count, 1)
    energy = gram.diagonal().mean().clamp(min=1e-12)
    # In place from here on: for a wide matrix each of these is as large as a layer.
    left = moment.to(gram, copy=True)
    left /= left.diagonal().mean().clamp(min=1e-12)
    left *= energy * penalty.unrelated
    left += gram
    left.diagonal().add_(energy * penalty.ridge)
    start = None if around is None else around.T.to(cross)
    wanted = cross if start is None else cross - gram @ start
    del gram
    found = torch.cholesky_solve(wanted, torch.linalg.cholesky(left))
    return (found if start is None else start + found).T.float()
