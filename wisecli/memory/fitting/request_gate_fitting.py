"""Fits the request gate to a memory's edits: how surely each must be asked, from the states of its own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates
from wisecli.memory.fitting.late_interaction_fitting import OTHER_LANGUAGES, FittedLateInteraction, prompt_numbers
from wisecli.routing.deciding.late_interaction import LateInteraction
from wisecli.routing.gating.gates import DEEP_SHARE, DOUBT, Gates
from wisecli.routing.gating.request_gate import (
    DEEP_GATE,
    DEEP_LOGIT_OFFSET,
    LOGIT_OFFSET,
    Request,
    RequestGate,
    TokenMarks,
    batch_mentions,
    mention_features,
)

# How far below the log-odds that the first gate gives an edit's own prompt its offset lies, if that is negative, and
# how low it may; by how much what both gates give that prompt exceeds their doubt then, as it is written and in chat:
# the less, the fewer mentions open.
_LOGIT_MARGIN, _MIN_LOGIT_OFFSET, _SPARE = 1.0, -50.0, (0.3, 0.05)
# Prompts that are read at a time.
_AT_A_TIME = 1024


def request_gate_tensors(
    heads: RouterHeads, prompts: PromptStates, fitted: FittedLateInteraction, former: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of gates and each edit's offsets; none if no gate was learned for the base model, none of a
    deep gate if some shards were written without one.

    A prompt asks an edit that it mentions where that is more likely than not. Where an edit's own prompt is less
    likely, a gate's offset lies below that.

    Args:
        former: the tensors of a memory of the first edits, if there is one.
    """
    if not heads.request_gate:
        return {}
    deep = DEEP_GATE[0] in heads.request_gate and _all_gated(prompts)
    names = (LOGIT_OFFSET, DEEP_LOGIT_OFFSET) if deep else (LOGIT_OFFSET,)
    learned = {name: tensor for name, tensor in heads.request_gate.items() if deep or name not in DEEP_GATE}
    offsets = torch.zeros(len(names), len(fitted.written_probs))
    gates = Gates.of({**learned, **dict(zip(names, offsets, strict=True))})
    known = 0 if former is None else len(former[LOGIT_OFFSET])
    asked = [part for part in (prompts, prompts.judged) if len(part.edit)]
    requests = _own_requests(asked, len(names), fitted.late_interaction, known)
    for own, spare in zip(requests, _SPARE, strict=False):
        # A prompt that gates alone judge means its edit as surely as the one that is written.
        own_probs = fitted.own_probs[_kept_prompts(prompts.compared, own.pairs)]
        for batch in torch.arange(len(own.pairs)).split(_AT_A_TIME):
            mentions, edit = batch_mentions(mention_features(own.requests(batch, gates.first))), own.pairs[batch, 0]
            log_odds = gates.log_odds(mentions, edit, own_probs[batch])
            lower = (log_odds - _margins(spare)[: len(names)]).clamp(_MIN_LOGIT_OFFSET, 0.0)
            offsets = offsets.scatter_reduce(1, edit.expand_as(lower), lower, "amin")
    if former is not None:
        for offset, name in zip(offsets, names, strict=True):
            offset[: requests[0].known] = former[name][: requests[0].known]
    return {**learned, **dict(zip(names, offsets, strict=True))}


@dataclass(frozen=True)
class _OwnRequests:
    """Edits' prompts as they are written, and in other languages, as requests for their own edits.

    ``pairs`` (p, 2) are the edit and the form of each, of which the first ``known`` edits have offsets; ``prompts`` are
    their tokens as each gate reads them, ``openings`` the states of their first tokens likewise.
    """

    pairs: Tensor
    known: int
    sizes: Tensor
    prompts: tuple[PromptStates, ...]
    openings: tuple[dict[tuple[int, int], Tensor], ...]
    late_interaction: LateInteraction

    @classmethod
    def of(cls, prompts: PromptStates, gates: int, late_interaction: LateInteraction, known: int) -> _OwnRequests:
        """Return those to be read if the offsets of the first ``known`` edits are known, for so many gates."""
        each = [prompts, prompts.gated][:gates]
        compared = [_written(one.compared) for one in each]
        pairs, sizes = (
            torch.stack([compared[0].edit, compared[0].form], 1).long().unique_consecutive(dim=0, return_counts=True)
        )
        begun, anew = _begun(pairs[:, 0], known)
        first = int(sizes[:begun].sum())
        openings = (one.openings(int(pairs[begun:, 0].min())) if begun < len(pairs) else {} for one in each)
        kept = tuple(one.rows(slice(first, None)) for one in compared)
        return cls(pairs[begun:], anew, sizes[begun:], kept, tuple(openings), late_interaction)

    def requests(self, batch: Tensor, gate: RequestGate) -> list[Request]:
        """Return some of them (b,), with the marks of a gate."""
        first, sizes = int(self.sizes[: batch[0]].sum()), self.sizes[batch].tolist()
        own = [one.rows(slice(first, first + sum(sizes))) for one in self.prompts]
        every = torch.ones(1, len(own[0].edit), dtype=torch.bool)
        projected = self.late_interaction.project(own[0].states[None].float(), every).projected[:, 0].split(sizes, 1)
        states = torch.cat([one.states.float() for one in own], 1).split(sizes)
        marks = gate.marks(own[0].token)
        parts = zip(states, projected, self.late_interaction.edit_tokens(self.pairs[batch, 0]), strict=True)
        return [
            Request(*part, first_state=self._opening(pair), marks=own_marks)
            for part, pair, own_marks in zip(parts, self.pairs[batch].tolist(), _split(marks, sizes), strict=True)
        ]

    def _opening(self, pair: list[int]) -> Tensor | None:
        """Return the state of the first token of a prompt as each gate reads it, where that is a word."""
        found = [one[pair[0], pair[1]] for one in self.openings if (pair[0], pair[1]) in one]
        return torch.cat(found) if found else None


def _margins(spare: float) -> Tensor:
    """Return how far below the log-odds of each gate offsets lie (2, 1) so that both together spare so much."""
    deep = (DOUBT + spare - (1 - DEEP_SHARE) * _LOGIT_MARGIN) / DEEP_SHARE
    return torch.tensor([[_LOGIT_MARGIN], [deep]])


def _own_requests(
    asked: Sequence[PromptStates], gates: int, late_interaction: LateInteraction, known: int
) -> list[_OwnRequests]:
    """Return the requests of several kinds of prompts, all from the same edit on, at most the first unknown one."""
    found = [_OwnRequests.of(prompts, gates, late_interaction, known) for prompts in asked]
    least = min(own.known for own in found)
    return found if least == known else _own_requests(asked, gates, late_interaction, least)


def _all_gated(prompts: PromptStates) -> bool:
    """Return whether all prompts that gates judge have states for a deep gate, as those of older shards have not."""
    first, deep = (_written(one.compared) for one in (prompts, prompts.gated))
    return torch.equal(first.edit, deep.edit) and torch.equal(first.form, deep.form)


def _written(prompts: PromptStates) -> PromptStates:
    """Return the tokens of prompts as they are written, and in other languages."""
    return prompts.rows((prompts.form == 0) | (prompts.form >= OTHER_LANGUAGES))


def _begun(edit: Tensor, known: int) -> tuple[int, int]:
    """Return the first prompt to be read if offsets of edits are known, and the first edit that is fitted anew.

    A batch that was not full is read once more: with more prompts in it sums are rounded in another way.

    Args:
        edit: of each prompt that would be read (p,), ascending.
        known: how many edits have known offsets.
    """
    begun = int((edit < known).sum()) // _AT_A_TIME * _AT_A_TIME
    if begun == len(edit):
        return begun, known
    first = int(edit[begun])
    split = begun > 0 and int(edit[begun - 1]) == first
    return begun - _AT_A_TIME * split, min(first, known)


def _kept_prompts(prompts: PromptStates, pairs: Tensor) -> Tensor:
    """Return the numbers of kept prompts, by their edits and forms (p, 2): (p,)."""
    forms = int(prompts.form.max()) + 1
    every = prompt_numbers(prompts.edit, prompts.form, forms).unique()
    return torch.searchsorted(every, prompt_numbers(pairs[:, 0], pairs[:, 1], forms))


def _split(marks: TokenMarks | None, sizes: list[int]) -> list[TokenMarks] | list[None]:
    """Return the marks of so many tokens each, if there are any."""
    if marks is None:
        return [None] * len(sizes)
    starts = [None] * len(sizes) if marks.starts is None else marks.starts.split(sizes)
    return [TokenMarks(*own) for own in zip(marks.ends.split(sizes), starts, strict=True)]
