"""Splits a request that mentions two edits, so that each part can be judged by itself. Needs torch only.

Each edit is mentioned in one sentence, and asked by what is left without the other's. Two in the same sentence ("Who
wrote X, and who painted Y?") are parted where what comes before has the one best and what comes behind the other.
Exports carry this very file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.routing.gating.sentence_features import EditCosines, mention_sentences, sentence_of


class RequestParts(NamedTuple):
    """The tokens of a request (n,) that may ask each of two edits, and whether the first edit's come first."""

    first: Tensor
    second: Tensor
    in_order: bool


def first_part(projected: Tensor, edits: Sequence[tuple[Tensor, Tensor]], ends: Tensor) -> Tensor:
    """Return which tokens of a request may ask the first of two edits that it mentions (n,).

    Args:
        projected: the request's tokens under both projections (2, n, k).
        edits: the tokens of each edit's prompt, its subject's and the others' (t, k).
        ends: what each token ends (n,).
    """
    cosines = EditCosines.of([projected] * 2, edits)
    sentence = sentence_of(ends[None], torch.zeros_like(cosines.mask[:1]))[0]
    first, second = mention_sentences(cosines, sentence.expand_as(cosines.mask))
    return request_parts((cosines.of_request(0), cosines.of_request(1)), (first, second), sentence).first


def request_parts(cosines: tuple[Tensor, Tensor], mentions: tuple[int, int], sentence: Tensor) -> RequestParts:
    """Return the parts of a request for two edits.

    Args:
        cosines: of the request's tokens with all of each edit's (n, t).
        mentions: the number of the sentence that mentions each.
        sentence: the number of each token's sentence (n,).
    """
    own, other = mentions
    if own != other:
        return RequestParts(sentence != other, sentence != own, own < other)
    inside = (sentence == own).nonzero().flatten()
    before = [_match_up_to(one[inside]) for one in cosines]
    behind = [_match_up_to(one[inside].flip(0)).flip(0) for one in cosines]
    ways = torch.stack([before[0][:-1] + behind[1][1:], before[1][:-1] + behind[0][1:]])
    if not ways.shape[1]:
        return RequestParts(sentence == own, sentence != own, True)
    way, edge = divmod(int(ways.argmax()), ways.shape[1])
    early, late = (torch.ones_like(sentence, dtype=torch.bool) for _ in range(2))
    early[inside[edge + 1 :]], late[inside[: edge + 1]] = False, False
    return RequestParts(early, late, True) if way == 0 else RequestParts(late, early, False)


def _match_up_to(cosines: Tensor) -> Tensor:
    """Return how well the tokens up to each one match an edit's, as the mean of these' best cosines: (n, t) → (n,)."""
    return cosines.cummax(0).values.mean(1)
