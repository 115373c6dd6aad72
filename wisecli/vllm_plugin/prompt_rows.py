"""Prompts as rows of token ids, and how many of them are looked at together. Needs torch only."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Tokens of windows that are decided at once, padding too: an engine leaves little of a GPU's memory to others.
_AT_ONCE = 2**14


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts' token ids padded on the right (B, T), and which of them are no padding (B, T)."""
    rows = [torch.tensor(list(prompt), dtype=torch.long) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def batches(lengths: Tensor) -> Iterator[Tensor]:
    """Yield rows of these lengths (B,) by their numbers, those of a length together: as many at once as are no more
    than ``_AT_ONCE`` tokens, padded to the longest of them, or one.
    """
    order = lengths.argsort(stable=True)  # the same in every process
    first = 0
    for place, length in enumerate(lengths[order].tolist()):
        if place > first and (place + 1 - first) * length > _AT_ONCE:
            yield order[first:place]
            first = place
    if len(order):
        yield order[first:]
