"""Fits the request gate to a memory's edits: how surely each must be asked, from the states of its own prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates
from wisecli.memory.fitting.late_interaction_fitting import OTHER_LANGUAGES, FittedLateInteraction, prompt_numbers
from wisecli.routing.gating.request_gate import (
    LOGIT_OFFSET,
    Request,
    RequestGate,
    TokenMarks,
    batch_mentions,
    mention_features,
    unsureness,
)

# How far below the log-odds of its own prompt an edit's offset lies, if that is negative, and how low it may.
_LOGIT_MARGIN, _MIN_LOGIT_OFFSET = 1.0, -50.0
# Prompts that are read at a time.
_AT_A_TIME = 1024


def request_gate_tensors(
    heads: RouterHeads, prompts: PromptStates, fitted: FittedLateInteraction, former: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors ``REQUEST_GATE`` and each edit's offset; none if no gate was learned for the base model.

    A prompt asks an edit that it mentions where that is more likely than not. Where an edit's own prompt is less
    likely, its offset lies below that.

    Args:
        former: the tensors of a memory of the first edits, if there is one.
    """
    if not heads.request_gate:
        return {}
    edits = len(fitted.written_probs)
    late_interaction, logit_offset = fitted.late_interaction, torch.zeros(edits)
    gate = RequestGate({**heads.request_gate, LOGIT_OFFSET: logit_offset})
    held, gated = 0 if former is None else len(former[LOGIT_OFFSET]), prompts.gated
    written, known = _written(prompts.compared, held)
    own_probs = fitted.own_probs[_kept_prompts(prompts.compared, written.pairs)]
    openings = gated.openings(int(written.pairs[:, 0].min())) if len(written.pairs) else {}
    sizes, marks = written.sizes.tolist(), _marks(gate, written)
    states, gate_states = (
        written.prompts.states.split(sizes),
        _written(gated.compared, held)[0].prompts.states.split(sizes),
    )
    for batch in torch.arange(len(written.pairs)).split(_AT_A_TIME):
        own = torch.cat([states[number] for number in batch.tolist()]).float()
        turned = late_interaction.project(own[None], torch.ones(1, len(own), dtype=torch.bool)).projected[:, 0]
        counts, pairs = written.sizes[batch].tolist(), written.pairs[batch]
        own_marks = [marks[number] for number in batch.tolist()]
        read = [gate_states[number].float() for number in batch.tolist()]
        parts = zip(read, turned.split(counts, 1), own_marks, pairs.tolist(), strict=True)
        edit_tokens = late_interaction.edit_tokens(pairs[:, 0])
        requests = [
            Request(prompt, projected, tokens, first_state=openings.get((edit, form)), marks=prompt_marks)
            for (prompt, projected, prompt_marks, (edit, form)), tokens in zip(parts, edit_tokens, strict=True)
        ]
        log_odds = gate.log_odds(batch_mentions(mention_features(requests))) + unsureness(own_probs[batch])
        lower = (log_odds - _LOGIT_MARGIN).clamp(_MIN_LOGIT_OFFSET, 0.0)
        logit_offset = logit_offset.scatter_reduce(0, pairs[:, 0], lower, "amin")
    if former is not None:
        logit_offset[:known] = former[LOGIT_OFFSET][:known]
    return {**heads.request_gate, LOGIT_OFFSET: logit_offset}


class _Written(NamedTuple):
    """Edits' prompts as they are written, and in other languages: the edit and the form of each (p, 2), how many tokens
    it has (p,), and those.
    """

    pairs: Tensor
    sizes: Tensor
    prompts: PromptStates


def _written(prompts: PromptStates, known: int) -> tuple[_Written, int]:
    """Return the prompts to be read if the offsets of the first ``known`` edits are known, and the first edit that is
    fitted anew.
    """
    rows = ((prompts.form == 0) | (prompts.form >= OTHER_LANGUAGES)).nonzero().flatten()
    each = torch.stack([prompts.edit[rows].long(), prompts.form[rows].long()], 1)
    pairs, sizes = each.unique_consecutive(dim=0, return_counts=True)
    begun, anew = _begun(pairs[:, 0], known)
    return _Written(pairs[begun:], sizes[begun:], prompts.rows(rows[int(sizes[:begun].sum()) :])), anew


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


def _marks(gate: RequestGate, written: _Written) -> list[TokenMarks] | list[None]:
    """Return the marks of the tokens of each prompt, if the gate uses any."""
    sizes, marks = written.sizes.tolist(), gate.marks(written.prompts.token)
    if marks is None:
        return [None] * len(sizes)
    starts = [None] * len(sizes) if marks.starts is None else marks.starts.split(sizes)
    return [TokenMarks(*own) for own in zip(marks.ends.split(sizes), starts, strict=True)]
