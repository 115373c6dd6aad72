"""Second moments of keys by their leading part, and the whitenings that are their shrunk inverses."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Rank of what is kept of a moment.
_RANK = 512
# A decomposition is exact up to this many rows or columns.
_EXACT = 4096
# So many rows are turned to float64 at a time.
_PART = 1024
# Rank of a whitening: beyond it the moment is taken as even in all directions. 512 routes no better.
_WHITENED = 256
# Eigenvalues are raised by this share of their mean before they are inverted.
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class Moment:
    """Leading eigenvalues ``variances`` (r,) and ``directions`` (r, d_ff) of ``E[a aᵀ]``; ``energy`` (1,) its trace."""

    variances: Tensor
    directions: Tensor
    energy: Tensor

    def dense(self, columns: Tensor | None = None) -> Tensor:
        """Return ``E[a aᵀ]`` (d_ff, d_ff), or on some columns (k, k), what the leading part leaves spread evenly."""
        rank, d_ff = self.directions.shape
        rest = (self.energy - self.variances.sum()).clamp(min=0) / max(d_ff - rank, 1)
        directions = self.directions if columns is None else self.directions[:, columns]
        scaled = (directions.T * (self.variances - rest)) @ directions
        scaled.diagonal().add_(rest)
        return scaled


@dataclass(frozen=True)
class Whitening:
    """``P = floor · I + directionsᵀ diag(gains) directions``: directions (r, d_ff), gains (r,)."""

    directions: Tensor
    gains: Tensor
    floor: float

    def apply(self, keys: Tensor) -> Tensor:
        """Return ``P a`` for keys (..., d_ff)."""
        return self.floor * keys + ((keys @ self.directions.T) * self.gains) @ self.directions

    def whitened_keys(self, keys: Tensor) -> Tensor:
        """Return ``P e / √(eᵀP e)`` for keys (n, d_ff)."""
        turned = self.apply(keys)
        return turned / (keys * turned).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()

    def cosines(self, first: Tensor, second: Tensor) -> Tensor:
        """Return whitened cosines of keys (n, d_ff) with keys (m, d_ff): (n, m)."""
        probes = self.whitened_keys(second)
        lengths = (first * self.apply(first)).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        found: Tensor = first @ probes.T / lengths
        return found


def whitening(moment: Moment) -> Whitening:
    """Return the inverse of a second moment, shrunk, from its leading part; what that leaves is spread evenly."""
    d_ff = moment.directions.shape[1]
    energy = float(moment.energy)
    leading = moment.variances[:_WHITENED]
    mean = energy / d_ff
    rest = max(energy - float(leading.sum()), 0.0) / max(d_ff - len(leading), 1)
    raised = mean * _SHRINKAGE
    floor = 1 / (rest + raised)
    # The unit in which P is measured cancels in a cosine; this one keeps its entries near 1.
    return Whitening(moment.directions[: len(leading)], mean * (1 / (leading + raised) - floor), mean * floor)


def scaled(keys: Tensor) -> Tensor:
    """Return rows whose ``rowsᵀ rows`` is the keys' second moment."""
    rows: Tensor = keys / len(keys) ** 0.5
    return rows


def even(keys: Tensor) -> Tensor:
    """Return rows as :func:`scaled` does, with 1 as the mean eigenvalue of ``rowsᵀ rows``."""
    rows = scaled(keys)
    evened: Tensor = rows * (rows.shape[1] / rows.square().sum().clamp(min=1e-12)).sqrt()
    return evened


def leading(rows: Tensor, rank: int = _RANK) -> Moment:
    """Return the leading part of ``rowsᵀ rows`` for rows (n, d_ff); exact unless both sides are long."""
    # A part at a time: in float64 the rows would take twice what they do.
    energy = torch.stack([part.double().square().sum() for part in rows.split(_PART)]).sum().reshape(1).float().cpu()
    rank = min(rank, *rows.shape)
    if min(rows.shape) > _EXACT:
        with torch.random.fork_rng(devices=[rows.device] if rows.device.type == "cuda" else []):
            torch.manual_seed(0)
            _, lengths, vectors = torch.svd_lowrank(rows, q=rank, niter=4)
        return Moment(lengths.square().float().cpu(), vectors.T.float().contiguous().cpu(), energy)
    tall = len(rows) >= rows.shape[1]
    variances, vectors = torch.linalg.eigh((rows.T @ rows if tall else rows @ rows.T).double())
    kept, vectors = variances[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1).to(rows.dtype)
    directions = vectors.T if tall else F.normalize(vectors.T @ rows, dim=-1)
    return Moment(kept.float().cpu(), directions.float().contiguous().cpu(), energy)
