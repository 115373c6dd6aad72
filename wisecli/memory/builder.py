"""Evidence → the side memory that stores it: one matrix, several, or a lookup; and the thresholds of its router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from wisecli.artifacts.shard import LANGUAGES, Evidence, Mask, half
from wisecli.artifacts.unrelated_stats import Unrelated
from wisecli.config import MergeSettings
from wisecli.editing.ridge import Penalty, Statistics, solve, statistics
from wisecli.routing.calibration import (
    APART,
    Calibration,
    calibrate,
    even_out,
    key_router,
    measure,
    peaks_above_usual,
    scores,
)
from wisecli.routing.scores import INSIDE, MemoryScores, SideMemory
from wisecli.routing.subject_names import Spellings, names_of
from wisecli.routing.whitening import Whitening, whitening

# Keys inside answers get this share of the false alarms: they lose few rephrases by it, and open on names otherwise.
_INSIDE = 1 / 6
# False alarms: of all tokens, and where a prompt must name an edit's subject besides.
_OF_ALL, _OF_NAMED = 0.0015, 0.0075
# How much nearer a prompt in another language must come than other edits' prompts in such do; how near those come at
# least, as few say little of all that might be asked; and how many are compared at a time.
_FOREIGN, _LEAST, _PART = 0.1, 0.5, 1024

Built = tuple[SideMemory, tuple[Calibration, ...]]


@dataclass(frozen=True)
class Material:
    """All that shards know: evidence with the edits counted through, the shard that each key is of (n,), the masks,
    the statistics of unrelated text, and the words of every edit's subject (none of one that its prompt does not name).
    """

    evidence: Evidence
    shard: Tensor
    masks: tuple[Mask, ...]
    unrelated: Unrelated
    subjects: tuple[Spellings, ...] = ()


def solve_exactly(material: Material, penalty: Penalty) -> Tensor:
    """``Δ`` (d, d_ff) as if one shard had held all edits, on all columns: statistics of shards add up."""
    return solve(_known(material), penalty, material.unrelated.tokens.dense())


def refit(merged: Tensor, material: Material, penalty: Penalty) -> Tensor:
    """Around a merged ``Δ`` (d, d_ff), give every key its residual back, on the columns that any shard may use."""
    used = torch.cat([m.indices if m.kind == "columns" else torch.arange(m.d_ff) for m in material.masks]).unique()
    moment = material.unrelated.tokens.dense(used)
    return merged.index_copy(1, used, solve(_known(material, used), penalty, moment, around=merged[:, used]))


def _known(material: Material, columns: Tensor | None = None) -> Statistics:
    kept, evidence = ~material.evidence.held_out, material.evidence
    shards = (kept & (material.shard == number) for number in range(len(material.masks)))
    keys = evidence.keys if columns is None else evidence.keys[:, columns]
    return reduce(add, (statistics(keys[own], evidence.residuals[own]) for own in shards))


def matrices(deltas: Tensor, material: Material, settings: MergeSettings) -> Built:
    """A memory of deltas (M, d, d_ff): one for all edits, or one a shard."""
    owner = material.shard if len(deltas) > 1 else torch.zeros_like(material.shard)
    draft = SideMemory(pack(deltas), (1.0,) * len(deltas), settings.router or "key", settings.routing or "token")
    return _routed_by(draft, material, owner, settings)


def lookup(material: Material, settings: MergeSettings) -> Built:
    """A memory that keeps every key with what it should add; a residual that contexts share is kept once."""
    evidence = material.evidence
    kept = ~evidence.held_out
    place = evidence.answer[kept] * (int(evidence.position.max()) + 1) + evidence.position[kept]
    residuals = evidence.residuals[kept]
    _, value = place.unique(return_inverse=True)
    values = residuals.new_zeros(int(value.max()) + 1, residuals.shape[1])
    values[value] = residuals
    if not torch.equal(values[value], residuals):  # trained changes add something else under every context
        values, value = residuals, torch.arange(len(residuals))
    owner = evidence.edit.long()
    draft = SideMemory(
        {"values": half(values), "value": value, **_naming(material, settings)},
        (1.0,) * (int(owner.max()) + 1),
        "key",
        settings.routing or "token",
        kind="lookup",
        sharpness=settings.sharpness,
    )
    return _routed_by(draft, material, owner, settings)


def _routed_by(draft: SideMemory, material: Material, owner: Tensor, settings: MergeSettings) -> Built:
    """Give a memory its router and thresholds; ``owner`` (n,) is the memory that each key of the evidence opens."""
    evidence, quiet, kinds, level = material.evidence, material.unrelated.keys, material.unrelated.chat, 1.0
    calibrating = _calibrating(material, settings)
    rule, share = settings.threshold or "false-alarm", _share(settings, named="asks" in draft.tensors)
    if draft.router == "key":
        draft, level = _with_probes(draft, material, owner, settings)
    routed = MemoryScores(draft)
    away, own = scores(routed, quiet), scores(routed, evidence.keys[calibrating])
    mine = own.gather(1, owner[calibrating, None]).flatten()
    if draft.router == "norm":
        found = tuple(
            calibrate(mine[owner[calibrating] == number], away[:, number], rule=rule, false_alarm=share, kinds=kinds)
            for number in range(len(draft.thresholds))
        )
        return replace(draft, thresholds=tuple(one.threshold for one in found)), found
    # The nearest key decides between memories, so they share one threshold.
    whole = calibrate(mine, away.amax(-1), rule=rule, false_alarm=share, kinds=kinds)
    if rule != "minimum" and level > whole.threshold:  # both kinds rarely use up their share of false alarms
        whole = measure(mine, away.amax(-1), level, rule=rule)
    thresholds = (whole.threshold,) * len(draft.thresholds)
    if draft.kind == "lookup" or len(thresholds) == 1:
        return replace(draft, thresholds=thresholds), (whole,)
    apart = tuple(
        measure(mine[owner[calibrating] == number], away[:, number], whole.threshold, rule=rule)
        for number in range(len(thresholds))
    )
    return replace(draft, thresholds=thresholds), apart


def _with_probes(
    draft: SideMemory, material: Material, owner: Tensor, settings: MergeSettings
) -> tuple[SideMemory, float]:
    """The same memory with every trained key as a probe, and the threshold they share.

    Inside an answer the token itself says most of a key, so unrelated text with the same name in it comes much nearer
    than it ever comes to the end of a prompt: those keys are seen through another whitening, and made comparable. So
    are those that prompts in the chat template end in, which are all alike but for what was asked.
    """
    evidence = material.evidence
    kept = ~evidence.held_out
    unrelated, inside = material.unrelated, evidence.position[kept] > 0
    metric = inside.long() * INSIDE
    held, asks = _held(draft), draft.tensors.get("asks")
    share = _share(settings, named=asks is not None)
    # Where a prompt decides, keys inside answers open nothing, and are compared with each other only.
    moments, shares = [unrelated.wording, unrelated.tokens], [share * (1 - _INSIDE * (not held)), share * _INSIDE]
    if unrelated.chatting is not None:
        metric[evidence.chat[kept] & ~inside] = len(moments)
        moments.append(unrelated.chatting)
        shares.append(share)
    if asks is not None and bool((unasked := (metric == 0) & ~asks).any()):
        # They open whatever a prompt names, and so for fewer prompts.
        metric[unasked] = len(moments)
        moments.append(unrelated.wording)
        shares.append(_share(settings, named=False))
    tensors = key_router(evidence.keys[kept], owner[kept], metric, [whitening(moment) for moment in moments])
    by_metric = MemoryScores(SideMemory({**tensors, "owner": metric}, (1.0,) * len(moments), "key"))
    # Inside an answer the token says most of a key, and text that spares a rare one says nothing of what else has it.
    usual, peaks = peaks_above_usual(by_metric, unrelated.keys, metric != INSIDE, metric, len(moments))
    near, margins = evidence.elsewhere[kept] * inside, torch.full((len(metric),), APART)
    foreign = (evidence.context[kept] >= LANGUAGES) & ~inside
    if bool(foreign.any()):
        margins[foreign] = _FOREIGN
        near[foreign] = _among_others(evidence.keys[kept][foreign], evidence.edit[kept][foreign], whitening(moments[0]))
    factors, level = even_out(peaks, usual, metric, near, shares, kinds=unrelated.chat, margins=margins)
    if held:
        factors[metric == INSIDE] = 1.0
    tensors |= {"probes": half(tensors["probes"] * factors[:, None]), "offset": 1 - factors}
    return replace(draft, tensors={**draft.tensors, **tensors}), level


def _naming(material: Material, settings: MergeSettings) -> dict[str, Tensor]:
    """By which tokens prompts name subjects, and which trained keys ask for that, if prompts decide.

    Prompts in other languages may write them otherwise.
    """
    names = names_of(material.subjects) if settings.routing == "sequence" and settings.subjects == "named" else {}
    if not names:
        return {}
    evidence, known = material.evidence, torch.tensor([bool(words) for words in material.subjects])
    asks = known[evidence.edit.long()] & (evidence.position == 0) & (evidence.context < LANGUAGES)
    return {**names, "asks": asks[~evidence.held_out]}


def _share(settings: MergeSettings, *, named: bool) -> float:
    """The false-alarm rate; a higher one where a prompt must name the subject besides."""
    if settings.false_alarm is not None:
        return settings.false_alarm
    return _OF_NAMED if named else _OF_ALL


def _among_others(keys: Tensor, edit: Tensor, white: Whitening) -> Tensor:
    """How near each key (n, d_ff) comes to those of other edits (n,): (n,).

    Unrelated text is English. What prompts in other languages have in common is seen in those prompts alone.
    """
    found = []
    for own, number in zip(keys.split(_PART), edit.split(_PART), strict=True):
        cosines = white.cosines(own, keys).masked_fill(number[:, None] == edit, _LEAST)
        found.append(cosines.amax(-1))
    return torch.cat(found)


def _held(memory: SideMemory) -> bool:
    """Whether a prompt decides for a whole row, and each token after it only with which key."""
    return memory.kind == "lookup" and memory.routing == "sequence"


def _calibrating(material: Material, settings: MergeSettings) -> Tensor:
    """Which keys ought to be routed: under the unseen context, or for the paper's rule those trained on.

    So are those of a shard whose edits in the unseen context have all been taken out.
    """
    evidence, shard = material.evidence, material.shard
    chosen = ~evidence.held_out
    if settings.threshold != "minimum":
        chosen = evidence.held_out | ~torch.isin(shard, shard[evidence.held_out])
    return chosen & (evidence.position == 0) if settings.routing == "sequence" else chosen


def pack(deltas: Tensor) -> dict[str, Tensor]:
    """Dense deltas (M, d, d_ff) → the columns they touch (M, k), padded with empty ones, and ``Δ`` there (M, d, k)."""
    used = [delta.abs().sum(0).nonzero().flatten() for delta in deltas]
    width = max(1, *(len(columns) for columns in used))
    columns = torch.zeros(len(deltas), width, dtype=torch.long)
    packed = deltas.new_zeros(len(deltas), deltas.shape[1], width)
    for number, touched in enumerate(used):
        columns[number, : len(touched)] = touched
        packed[number, :, : len(touched)] = deltas[number][:, touched]
    return {"columns": columns, "delta": packed}


def join(parts: Sequence[Evidence], places: Sequence[Tensor]) -> Evidence:
    """Evidence of several shards as one; ``places`` say for each shard where its edits (by number) are in the whole."""
    counted = [replace(part, edit=place[part.edit.long()]) for part, place in zip(parts, places, strict=True)]
    fields = Evidence.__dataclass_fields__
    return Evidence(**{name: torch.cat([getattr(part, name) for part in counted]) for name in fields})
