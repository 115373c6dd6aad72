"""Unit vectors that are as far apart as possible: codes by which few channels tell many things apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Steps of pushing codes apart, how sharply the closest count, and beyond how many it is not tried.
_STEPS, _SHARPNESS, _MOST = 300, 40.0, 3000


@torch.enable_grad()
def packed_codes(count: int, channels: int) -> Tensor:
    """Return unit vectors (count, channels) with small inner products; at right angles if there are channels enough."""
    if count <= channels:
        return torch.eye(channels)[:count]
    codes = F.normalize(torch.randn(count, channels, generator=torch.Generator().manual_seed(0)), dim=-1)
    if count > _MOST:
        return codes
    codes.requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.02)
    for _ in range(_STEPS):
        unit = F.normalize(codes, dim=-1)
        products = (unit @ unit.T).masked_fill(torch.eye(count, dtype=torch.bool), 0)
        loss = (products.abs() * _SHARPNESS).flatten().logsumexp(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(codes.detach(), dim=-1)


def coherence(codes: Tensor) -> float:
    """Return the largest inner product of two codes (n, c), at least 0."""
    if len(codes) < 2:
        return 0.0
    # In parts: all pairs of thousands of codes are many.
    parts = (part @ codes.T - 2 * torch.eye(len(codes))[index] for part, index in _parts(codes))
    return max(0.0, *(float(part.max()) for part in parts))


def _parts(codes: Tensor) -> list[tuple[Tensor, slice]]:
    size = 1024
    return [(codes[begin : begin + size], slice(begin, begin + size)) for begin in range(0, len(codes), size)]
