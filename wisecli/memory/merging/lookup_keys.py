"""The keys and residuals of a lookup, taken from one shard's evidence after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.shard import BEGUN_CONTEXT, SPACE_CONTEXT, Evidence, half
from wisecli.routing.memories.fact_memory import ANSWER_WHITENING
from wisecli.routing.memories.whitening import Moment, whitening


@dataclass(frozen=True)
class Views:
    """The moments by which routing keys are whitened.

    Inside an answer the token itself says most of a key, so unrelated text with the same name in it comes much nearer
    than it ever comes to the end of a prompt: those keys have a whitening of their own. So have those that prompts in
    the chat template end in, which are all alike but for what was asked. Keys of a blank that prompts end in are for
    that token alone: they are whitened as keys inside answers are.
    """

    moments: tuple[Moment, ...]
    chatting: bool

    @classmethod
    def of(cls, unrelated: BackgroundStats) -> Views:
        """Return those of a base model; the last is for blanks that prompts end in."""
        chat = () if unrelated.chatting is None else (unrelated.chatting,)
        return cls((unrelated.wording, unrelated.tokens, *chat, unrelated.tokens), bool(chat))

    def which(self, evidence: Evidence) -> Tensor:
        """Return the index of the moment that whitens each key (n,)."""
        inside = (evidence.position > 0) | (evidence.context == BEGUN_CONTEXT)
        found = inside.long() * ANSWER_WHITENING
        if self.chatting:
            found[evidence.chat & ~inside] = ANSWER_WHITENING + 1
        found[evidence.context == SPACE_CONTEXT] = len(self.moments) - 1
        return found


def lookup_keys(
    parts: Iterable[Evidence], edit: Tensor, unrelated: BackgroundStats, strength: float
) -> dict[str, Tensor]:
    """Return the tensors of a lookup's keys and residuals, by their names in a side memory.

    Args:
        parts: of each shard the keys that were trained on, with float32 numbers.
        edit: the edit that each of all those keys is of (n,).
        strength: how many times a residual is added.
    """
    views = Views.of(unrelated)
    whitenings = [whitening(moment) for moment in views.moments]
    count, first = len(edit), 0
    whitened_keys = torch.empty(count, whitenings[0].directions.shape[1], dtype=torch.float16)
    whitening_index, key_to_residual = torch.empty_like(edit), torch.empty_like(edit)
    residuals, residual_count = [], 0
    for part in parts:
        rows = slice(first, first + len(part.edit))
        which, whitened = views.which(part), torch.empty_like(part.keys)
        for number in which.unique().tolist():
            whitened[which == number] = whitenings[number].whitened_keys(part.keys[which == number])
        rounded = half(whitened)
        if rounded.dtype != whitened_keys.dtype:
            whitened_keys = whitened_keys.to(torch.promote_types(whitened_keys.dtype, rounded.dtype))
        added, at = _distinct_residuals(part)
        whitened_keys[rows], whitening_index[rows], key_to_residual[rows] = rounded, which, at + residual_count
        residuals.append(half(strength * added))
        first, residual_count = rows.stop, residual_count + len(added)
    if not bool((whitening_index == len(whitenings) - 1).any()):  # no prompt ends in a blank
        whitenings.pop()
    return {
        "residuals": torch.cat(residuals),
        "key_to_residual": key_to_residual,
        "whitened_keys": whitened_keys,
        "cosine_offset": torch.zeros(count),
        "key_to_edit": edit,
        "whitening_index": whitening_index,
        "directions": torch.stack([one.directions for one in whitenings]),
        "gains": torch.stack([one.gains for one in whitenings]),
        "floors": torch.tensor([one.floor for one in whitenings]),
    }


def _distinct_residuals(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the residuals (m, d), each once, and which of them each key adds (n,): contexts share an answer's."""
    place = evidence.answer * (int(evidence.position.max()) + 1) + evidence.position
    _, index = place.unique(return_inverse=True)
    residuals = evidence.residuals.new_zeros(int(index.max()) + 1, evidence.residuals.shape[1])
    residuals[index] = evidence.residuals
    if not torch.equal(residuals[index], evidence.residuals):  # trained changes add something else in every context
        residuals, index = evidence.residuals.unique(dim=0, return_inverse=True)
    return residuals, index
