"""Gates of random keys, and stock checkpoints that hold a gate."""

from __future__ import annotations

from pathlib import Path

import torch

from wisecli.export.stock.stock_checkpoint import Gate, base_settings, gate_blocks, write_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import Site


def random_gate(keys: int, hidden: int, *, seed: int = 0) -> Gate:
    """Some keys that random states open, some by a part."""
    generator = torch.Generator().manual_seed(seed)
    return Gate(
        torch.randn(keys, hidden, generator=generator) * 4,
        torch.randn(keys, generator=generator) * 8,
        torch.randn(keys, hidden, generator=generator),
    )


def write_gate(
    output: Path, base: Path, checkpoint: Checkpoint, site: Site, gate: Gate, packing: Packing | None = None
) -> None:
    """Write a stock checkpoint with a gate into an empty directory."""
    blocks = gate_blocks(gate, base_settings(base), site.multiplier)
    write_stock(output, base, checkpoint, site, blocks, packing=packing)
