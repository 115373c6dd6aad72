"""Gates of random keys."""

from __future__ import annotations

import torch

from wisecli.export.stock.stock_checkpoint import Gate


def random_gate(keys: int, hidden: int, *, seed: int = 0) -> Gate:
    """Some keys that random states open, some by a part."""
    generator = torch.Generator().manual_seed(seed)
    return Gate(
        torch.randn(keys, hidden, generator=generator) * 4,
        torch.randn(keys, generator=generator) * 8,
        torch.randn(keys, hidden, generator=generator),
    )
