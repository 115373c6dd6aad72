"""Tensors of decoder blocks that compute steps and look with constant queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.export.stock.checkpoint.decoder_block import LayerSizes

# From closed to open, in units of what a step's neurons read.
WIDTH = 20.0


@dataclass(frozen=True)
class Steps:
    """Steps (n,): what each reads of the normed stream, ``reads`` (n, D) and ``offsets`` (n,), and ``adds`` (n, D)."""

    reads: Tensor
    offsets: Tensor
    adds: Tensor


def feed_forwards(sizes: LayerSizes, steps: Steps, first: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield feed-forwards of as many blocks as steps take, at least one.

    Args:
        first: how many neurons of the first one are left free.
    """
    begin, free = 0, first
    while begin < len(steps.offsets) or begin == 0:
        room = (sizes.width - free) // 2
        part = slice(begin, begin + room)
        reads, offsets, adds = steps.reads[part], steps.offsets[part], steps.adds[part] / WIDTH
        used = slice(free, free + 2 * len(offsets))
        gate, bias, passes = torch.zeros(sizes.width, sizes.hidden), torch.zeros(sizes.width), torch.zeros(sizes.width)
        down = torch.zeros(sizes.hidden, sizes.width)
        gate[used], passes[used] = reads.repeat_interleave(2, 0), 1.0
        bias[used] = torch.stack([offsets, offsets - WIDTH], 1).flatten()
        down[:, used] = torch.stack([adds, -adds], 1).flatten(0, 1).T
        yield {
            "mlp.gate_proj.weight": gate,
            "mlp.gate_proj.bias": bias,
            "mlp.up_proj.bias": passes,
            "mlp.down_proj.weight": down,
        }
        begin, free = max(begin + room, 1), 0


def attention(
    queries: Tensor, keys: Tensor, key_offsets: Tensor, values: Tensor, value_offsets: Tensor, output: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of an attention with constant queries."""
    return {
        "self_attn.q_proj.bias": queries,
        "self_attn.k_proj.weight": keys,
        "self_attn.k_proj.bias": key_offsets,
        "self_attn.v_proj.weight": values,
        "self_attn.v_proj.bias": value_offsets,
        "self_attn.o_proj.weight": output,
    }
