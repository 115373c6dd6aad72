"""Batches of prompts that begin alike, so that what they begin with is read once for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from wisecli.models.prompts.tokenization import SHARED

# What it costs to read prompts apart from others, in tokens.
_APART = 96
# Prompts whose lengths differ by no more than this are like in length.
_UNEVEN = 16
# Tokens of a batch: those that are read, and together with those that are known.
_READ, _ALL = 4096, 16384

Tokens = tuple[int, ...]


def batches_by_beginning(prompts: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts that begin alike and are of like lengths, at most ``size`` together."""
    own = _beginnings(prompts)
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: (own[index], len(prompts[index]), index)):
        if batch and (own[index] != own[batch[0]] or not _fits(prompts, batch, index, len(own[index]), size)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _fits(prompts: Sequence[Tokens], batch: Sequence[int], index: int, known: int, size: int) -> bool:
    """Return whether a prompt, no shorter than those of a batch, may be read with those.

    Args:
        known: how many tokens they all begin with.
    """
    longest, count = len(prompts[index]), len(batch) + 1
    even = longest - len(prompts[batch[0]]) <= max(_UNEVEN, (longest - known) // 4)
    return even and count <= size and count * (longest - known) <= _READ and count * longest <= _ALL


def _beginnings(prompts: Sequence[Tokens]) -> list[Tokens]:
    """Return the beginning of each prompt, by eights of tokens, behind which it is read, so that few are read in all.

    Prompts that share one are read apart from others if that spares more tokens than it costs.
    """
    found = list[Tokens]([()] * len(prompts))
    # Prompts that are alike for so many tokens, and behind how many tokens they are read so far.
    left = [(list(range(len(prompts))), 0, 0)]
    while left:
        alike, length, known = left.pop()
        parts = defaultdict[Tokens, list[int]](list)
        for index in alike:
            # The last token of a prompt is always read.
            if len(prompts[index]) > length + SHARED:
                parts[prompts[index][length : length + SHARED]].append(index)
        for part in parts.values():
            if len(part) > 1:
                deeper = _alike_length([prompts[index] for index in part], length + SHARED)
                spares = len(part) * (deeper - known) > deeper + _APART
                if spares:
                    for index in part:
                        found[index] = prompts[index][:deeper]
                left.append((part, deeper, deeper if spares else known))
    return found


def _alike_length(prompts: Sequence[Tokens], length: int) -> int:
    """Return how many tokens, by eights and at least ``length``, all of some prompts begin with before their last."""
    shortest = min(map(len, prompts))
    while shortest > length + SHARED and len({one[length : length + SHARED] for one in prompts}) == 1:
        length += SHARED
    return length
