"""Rows of a table that lie group by group, as the tokens of several texts do, and where those of a group are."""

import torch
from torch import Tensor


def rows_of(groups: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of some groups (b,), group after group, and each row's place in ``groups``: (m,) twice.

    Args:
        sizes: how many rows each group has, which lie one after the other (t,).
    """
    own, first = sizes[groups], sizes.cumsum(0) - sizes
    index = torch.arange(len(groups), device=sizes.device).repeat_interleave(own)
    offset = first[groups] - own.cumsum(0) + own
    return torch.arange(len(index), device=sizes.device) + offset[index], index
