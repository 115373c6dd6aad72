"""Fits a memory's router to evidence: thresholds of norms, or late interaction and the names of subjects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.shard import FIRST_LANGUAGE
from wisecli.config import MergeSettings
from wisecli.errors import SettingsError
from wisecli.memory.fitting.former_memory import EditProbs, FormerMemory
from wisecli.memory.fitting.further_edits import fit_further_edits
from wisecli.memory.fitting.late_interaction_fitting import MIN_EDIT_PROB, MIN_UNNAMED_PROB, fit_late_interaction
from wisecli.memory.fitting.question_sorts import asked_by_tensor
from wisecli.memory.fitting.request_gate_fitting import request_gate_tensors
from wisecli.memory.merging.merged_evidence import MergedEvidence
from wisecli.routing.deciding.question_words import ASKED_BY
from wisecli.routing.gating.request_gate import DEEP_GATE, MIN_GATED_PROB
from wisecli.routing.memories.calibration import Calibration, calibrate, measure, quantile
from wisecli.routing.memories.matrix_memory import MatrixMemory
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.memories.subject_tensors import Spellings, fuzzy_match_tensors, subject_match_tensors

# The share of unrelated tokens whose norm may open a matrix.
_RATE = 0.0015
# Where a mean decides, the threshold is this share of the lowest mean of any edit: that of the authors' code.
_OF_THE_LEAST = 0.88
# Keys that are compared at a time.
_AT_A_TIME = 4096


class Fitted(NamedTuple):
    """A memory, how it was calibrated, and where facts decide how surely prompts mean its edits."""

    memory: SideMemory
    calibrations: tuple[Calibration, ...]
    probs: EditProbs | None = None


def fit_thresholds(
    draft: SideMemory, merged_evidence: MergedEvidence, owner: Tensor, settings: MergeSettings
) -> Fitted:
    """Return a matrix memory with its thresholds of norms, and how these were calibrated.

    Args:
        draft: the memory without thresholds.
        owner: the memory that each key of the evidence opens (n,).
    """
    if draft.pooling == "mean":
        return _fit_mean(draft, merged_evidence, owner)
    rule, rate = settings.threshold or "false-alarm", settings.false_alarm or _RATE
    change = MatrixMemory(draft)
    background = _scores(change, merged_evidence.unrelated.keys)
    calibrating = _calibrating(merged_evidence, settings)
    owner = owner[calibrating]
    scores = _scores(change, merged_evidence.evidence.keys[calibrating]).gather(1, owner[:, None]).flatten()
    groups = merged_evidence.unrelated.chat
    found = tuple(
        calibrate(scores[owner == m], background[:, m], rule=rule, false_alarm=rate, groups=groups)
        for m in range(len(draft.thresholds))
    )
    return Fitted(replace(draft, thresholds=tuple(calibration.threshold for calibration in found)), found)


def _scores(change: MatrixMemory, keys: Tensor) -> Tensor:
    """Return scores (n, M) of many keys (n, d_ff), a slice at a time."""
    return torch.cat([change.scores(part) for part in keys.split(_AT_A_TIME)])


def _calibrating(merged_evidence: MergedEvidence, settings: MergeSettings) -> Tensor:
    """Return which keys ought to open their memory (n,): ends of prompts in the unseen context, or by the paper's
    rule of those trained on.

    Those trained on count, too, of a shard whose edits in the unseen context have all been taken out.
    """
    evidence, shard = merged_evidence.evidence, merged_evidence.shard
    chosen = merged_evidence.trained
    if settings.threshold != "minimum":
        chosen = evidence.held_out | ~torch.isin(shard, shard[evidence.held_out])
    return chosen & (evidence.position == 0)


def _fit_mean(draft: SideMemory, merged_evidence: MergedEvidence, owner: Tensor) -> Fitted:
    """Return a matrix memory whose thresholds lie just below the lowest score of any edit's prompts after training.

    What unrelated text calls it with is not known: the mean over a text decides, and single tokens are kept of it.

    Raises:
        SettingsError: the shards do not keep that.
    """
    calls, edit = merged_evidence.evidence.call, merged_evidence.evidence.edit
    if calls is None:
        raise SettingsError(
            "--set pooling=mean is for shards written by the paper's rule; write them with wise edit --preset paper"
        )
    each = calls.new_full((int(edit.max()) + 1,), torch.inf).scatter_reduce(0, edit.long(), calls, "amin")
    found = []
    for memory in range(len(draft.thresholds)):
        own = each[edit[owner == memory].long().unique()]
        found.append(measure(own, None, float(own.min()) * _OF_THE_LEAST, rule="minimum"))
    return Fitted(replace(draft, thresholds=tuple(calibration.threshold for calibration in found)), tuple(found))


def fit_facts(
    draft: SideMemory, merged_evidence: MergedEvidence, settings: MergeSettings, former: FormerMemory | None = None
) -> Fitted:
    """Return a memory whose edits open by late interaction, and how that was calibrated.

    Args:
        draft: the memory without what opens it.
        former: a memory of the first of the edits, if there is one.

    Raises:
        SettingsError: the shards do not keep what their edits' prompts mean.
    """
    heads, prompts = merged_evidence.unrelated.heads, merged_evidence.prompts
    if heads is None or prompts is None:
        raise SettingsError(
            "these shards do not say what prompts mean; write them anew with `wise edit`, or leave out --mode lookup"
        )
    edits = int(merged_evidence.evidence.edit.max()) + 1
    compared = prompts.compared
    if former is None or int(compared.edit.max()) < former.edits:  # no prompt of a further edit is compared
        fitted = fit_late_interaction(heads, compared, edits)
        gate = request_gate_tensors(heads, prompts, fitted)
    else:
        fitted, gate = fit_further_edits(heads, prompts, edits, former)
    alarms = fitted.unrelated.probs.amax(1)
    least = MIN_GATED_PROB if heads.request_gate else MIN_EDIT_PROB
    if settings.false_alarm is not None:
        least = max(least, quantile(alarms, 1 - settings.false_alarm))
    calibration = measure(fitted.own_probs, alarms, least, rule=settings.threshold or "false-alarm")
    if heads.mentioned is not None:
        opened, count = heads.mentioned.tolist()
        calibration = replace(calibration, mentioned=opened / max(1, count))
    opened = replace(
        draft,
        tensors={**draft.tensors, **naming(merged_evidence, settings), **fitted.tensors, **gate},
        thresholds=fitted.thresholds(_least_probs(merged_evidence, settings, edits, least)),
        state_layer=int(heads.layer),
        gate_layer=int(heads.gate_layer) if heads.gate_layer is not None and DEEP_GATE[0] in gate else None,
    )
    return Fitted(opened, (calibration,), EditProbs(fitted.own_probs, fitted.other_probs, fitted.unrelated.possible))


def _least_probs(merged_evidence: MergedEvidence, settings: MergeSettings, edits: int, least: float) -> Tensor:
    """Return the least probability at which a prompt opens each edit (M,): ``least``, or more if it need not name a
    subject.

    Prompts in other languages are less sure from the first; those edits keep ``least``.
    """
    probs = torch.full((edits,), least)
    if settings.subjects == "named" and merged_evidence.subjects:
        foreign = _in_other_languages(merged_evidence)
        unnamed = [edit for edit, words in enumerate(merged_evidence.subjects) if not words and edit not in foreign]
        probs[unnamed] = max(least, MIN_UNNAMED_PROB)
    return probs


def _in_other_languages(merged_evidence: MergedEvidence) -> set[int]:
    """Return the edits that have prompts in other languages."""
    evidence = merged_evidence.evidence
    return set(evidence.edit[evidence.context >= FIRST_LANGUAGE].tolist())


def naming(merged_evidence: MergedEvidence, settings: MergeSettings) -> dict[str, Tensor]:
    """Return the tensors of subject matching, from the tokens of edits' subjects.

    Prompts in other languages may write a subject otherwise: no prompt must name that of an edit which has such.
    """
    if settings.subjects != "named":
        return {}
    foreign = _in_other_languages(merged_evidence)
    named = [words if edit not in foreign else () for edit, words in enumerate(merged_evidence.subjects)]
    spelling = _spelling(merged_evidence, named)
    asked_by = {ASKED_BY: asked_by_tensor(merged_evidence.edits)} if spelling else {}
    return {**subject_match_tensors(named), **spelling, **asked_by}


def _spelling(merged_evidence: MergedEvidence, named: Sequence[Spellings]) -> dict[str, Tensor]:
    """Return the tensors of fuzzy matching for edits whose subject must be named; none if shards lack characters.

    Args:
        named: the words of every edit's subject, none for one that need not be named.
    """
    letters = merged_evidence.unrelated.token_characters
    if letters is None:
        return {}
    tokens = zip(named, merged_evidence.subject_tokens, strict=True)
    return fuzzy_match_tensors(letters, [own if words else () for words, own in tokens])
