"""Quick memories as decoder blocks: each key reads one token's own late state, and adds a residual where it opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks, DecoderBlock
from wisecli.export.stock.stock_checkpoint import base_settings, write_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import Site

# From nothing to all of a residual, in units of what a neuron reads.
WIDTH = 20.0


@dataclass(frozen=True)
class Keys:
    """Keys of `directions` (n, d), `offsets` (n,) and residuals `values` (n, d), in float32.

    Of a normed state `u` one adds `(silu(w·u + b) - silu(w·u + b - WIDTH)) / WIDTH · v`.
    """

    directions: Tensor
    offsets: Tensor
    values: Tensor

    def some(self, chosen: slice) -> Keys:
        return Keys(self.directions[chosen], self.offsets[chosen], self.values[chosen])


def random_keys(keys: int, hidden: int, *, seed: int = 0, loud: float = 4.0) -> Keys:
    """Some keys that random states open, some by a part.

    Args:
        loud: how large what they read is.
    """
    generator = torch.Generator().manual_seed(seed)
    return Keys(
        torch.randn(keys, hidden, generator=generator) * loud,
        torch.randn(keys, generator=generator) * 2 * loud,
        torch.randn(keys, hidden, generator=generator),
    )


def write_keys(
    output: Path, base: Path, checkpoint: Checkpoint, site: Site, keys: Keys, packing: Packing | None = None
) -> int:
    """Write a stock checkpoint with keys, in a stream of the base's width; return how many blocks they take."""
    config = base_settings(base)
    width = int(config["intermediate_size"])
    starts = range(0, max(1, len(keys.values)), width // 2)
    parts = [keys.some(slice(start, start + width // 2)) for start in starts]
    # Granite's layers multiply what they add, and blocks say what is to be added.
    blocks = [_block(part, width, site.multiplier) for part in parts]
    write_stock(output, base, checkpoint, site, AddedBlocks(blocks), packing=packing)
    return len(blocks)


def _block(keys: Keys, width: int, multiplier: float) -> DecoderBlock:
    """A feed-forward of `width` neurons, of which each key takes two."""
    free = width - 2 * len(keys.values)
    reads = keys.directions.repeat_interleave(2, 0)
    offsets = torch.stack([keys.offsets, keys.offsets - WIDTH], 1).flatten()
    adds = torch.stack([keys.values, -keys.values], 1).flatten(0, 1).T * (multiplier / WIDTH)
    return DecoderBlock(
        {
            "mlp.gate_proj.weight": F.pad(reads, (0, 0, 0, free)),
            "mlp.gate_proj.bias": F.pad(offsets, (0, free)),
            "mlp.up_proj.bias": F.pad(torch.ones(len(offsets)), (0, free)),
            "mlp.down_proj.weight": F.pad(adds, (0, free)),
        }
    )
