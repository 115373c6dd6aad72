"""The router of a memory, fitted to evidence: its routing keys, the names that prompts must hold, its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import ENDING, LANGUAGES, half
from wisecli.config import MergeSettings
from wisecli.errors import SettingsError
from wisecli.memory.material import Material
from wisecli.memory.meaning_fitting import SURE, fit_meaning, request_gate
from wisecli.routing.calibration import (
    APART,
    Calibration,
    calibrate,
    equalize_thresholds,
    excess_over_baseline,
    key_router,
    measure,
    quantile,
    scores_of,
)
from wisecli.routing.scores import INSIDE, MemoryScores, SideMemory
from wisecli.routing.subject_names import Spellings, names_of, spelling_of
from wisecli.routing.whitening import Moment, Whitening, whitening

# Keys inside answers get this share of the false alarms: they lose few rephrases by it, and open on names otherwise.
_INSIDE_SHARE = 1 / 6
# False-alarm rates: of all tokens, and where a prompt must name an edit's subject besides.
_RATE, _RATE_OF_NAMED = 0.0015, 0.0075
# Where a mean decides, the threshold is this share of the lowest mean of any edit: that of the authors' code.
_OF_THE_LEAST = 0.88
# How much nearer a prompt in another language must come than other edits' prompts in such do; how near those come at
# least, as few say little of all that might be asked; and how many are compared at a time.
_FOREIGN_MARGIN, _FOREIGN_LEAST, _AT_A_TIME = 0.1, 0.5, 1024

# The distance of a key of a blank that prompts end in counts so many times.
_NEARER = 1.25

Fitted = tuple[SideMemory, tuple[Calibration, ...]]


@dataclass(frozen=True)
class _Views:
    """The whitenings that routing keys are seen through, the false-alarm rate of each, and which key has which (n,)."""

    moments: list[Moment]
    rates: list[float]
    whitening_id: Tensor


def fit_router(draft: SideMemory, material: Material, owner: Tensor, settings: MergeSettings) -> Fitted:
    """A memory with its router's tensors and thresholds, and how those were calibrated.

    Args:
        draft: the memory without either.
        owner: the memory that each key of the evidence opens (n,).
    """
    rule = settings.threshold or "false-alarm"
    rate = _false_alarm(settings, named="asks" in draft.tensors)
    if draft.routing == "mean":
        return _fit_mean(draft, material, owner)
    shared = 1.0
    if draft.router == "key":
        draft, shared = _with_routing_keys(draft, material, owner, settings)
    router = MemoryScores(draft)
    background_scores = scores_of(router, material.unrelated.keys)
    calibrating = _calibrating(material, settings)
    owner = owner[calibrating]
    scores = scores_of(router, material.evidence.keys[calibrating])
    edit_scores = scores.gather(1, owner[:, None]).flatten()
    groups, memories = material.unrelated.chat, range(len(draft.thresholds))
    if draft.router == "norm":
        found = tuple(
            calibrate(edit_scores[owner == m], background_scores[:, m], rule=rule, false_alarm=rate, groups=groups)
            for m in memories
        )
        return replace(draft, thresholds=tuple(one.threshold for one in found)), found
    # The nearest key decides between memories, so they share one threshold.
    strongest = background_scores.amax(-1)
    whole = calibrate(edit_scores, strongest, rule=rule, false_alarm=rate, groups=groups)
    if rule != "minimum" and shared > whole.threshold:  # both kinds rarely use up their share of false alarms
        whole = measure(edit_scores, strongest, shared, rule=rule)
    fitted = replace(draft, thresholds=(whole.threshold,) * len(memories))
    if draft.kind == "lookup" or len(memories) == 1:
        return fitted, (whole,)
    apart = (measure(edit_scores[owner == m], background_scores[:, m], whole.threshold, rule=rule) for m in memories)
    return fitted, tuple(apart)


def _fit_mean(draft: SideMemory, material: Material, owner: Tensor) -> Fitted:
    """Thresholds a little below what any edit's prompts called their shard with, once it had been trained.

    What unrelated text calls it with is not known: the mean over a text decides, and single tokens are kept of it.

    Raises:
        SettingsError: the shards do not keep that.
    """
    calls, edit = material.evidence.call, material.evidence.edit
    if calls is None or draft.router != "norm":
        raise SettingsError(
            "--routing mean is for shards written by the paper's rule; write them with wise edit --preset paper"
        )
    each = calls.new_full((int(edit.max()) + 1,), torch.inf).scatter_reduce(0, edit.long(), calls, "amin")
    found = []
    for memory in range(len(draft.thresholds)):
        own = each[edit[owner == memory].long().unique()]
        found.append(measure(own, None, float(own.min()) * _OF_THE_LEAST, rule="minimum"))
    return replace(draft, thresholds=tuple(one.threshold for one in found)), tuple(found)


def fit_meaning_router(draft: SideMemory, material: Material, owner: Tensor, settings: MergeSettings) -> Fitted:
    """A lookup whose edits are opened by prompts that mean them; its keys say which residual answers.

    Args:
        draft: the memory without router.
        owner: the edit that each key of the evidence opens (n,).

    Raises:
        SettingsError: the shards do not keep what their edits' prompts mean.
    """
    heads, prompts = material.unrelated.heads, material.prompts
    if heads is None or prompts is None:
        raise SettingsError(
            "these shards do not say what prompts mean; write them anew with wise edit --router meaning"
        )
    memory, _ = _with_routing_keys(draft, material, owner, settings)
    fitted = fit_meaning(heads, prompts, len(memory.thresholds))
    alarms = fitted.unrelated.amax(1)
    least = SURE
    if settings.false_alarm is not None:
        least = max(SURE, quantile(alarms, 1 - settings.false_alarm))
    calibration = measure(fitted.own, alarms, least, rule=settings.threshold or "false-alarm")
    return replace(
        memory,
        tensors={**memory.tensors, **fitted.tensors, **request_gate(heads, prompts, fitted.tensors)},
        thresholds=fitted.thresholds(least),
        router="meaning",
        reads=int(heads.layer),
    ), (calibration,)


def naming(material: Material, settings: MergeSettings) -> dict[str, Tensor]:
    """The tensors that say by which tokens prompts name subjects, and which trained keys ask for that.

    There are none unless prompts decide. Prompts in other languages may write a subject otherwise, and are not asked;
    where prompts decide by what they mean, no prompt is for the edits that have such.
    """
    if settings.routing != "sequence" or settings.subjects != "named":
        return {}
    evidence = material.evidence
    if settings.router == "meaning":
        foreign = set(evidence.edit[evidence.context >= LANGUAGES].tolist())
        named = [words if edit not in foreign else () for edit, words in enumerate(material.subjects)]
        return {**names_of(named), **_spelling(material, named)}
    names = names_of(material.subjects)
    if not names:
        return {}
    known = torch.tensor([bool(words) for words in material.subjects])
    asks = known[evidence.edit.long()] & (evidence.position == 0) & (evidence.context < LANGUAGES)
    return {**names, "asks": asks[material.trained]}


def _spelling(material: Material, named: Sequence[Spellings]) -> dict[str, Tensor]:
    """The tensors that say how the subjects of edits are spelt that must be named, if the shards know.

    Args:
        named: the words of every edit's subject, none for one that need not be named.
    """
    letters = material.unrelated.letters
    if letters is None:
        return {}
    tokens = zip(named, material.subject_tokens, strict=True)
    return spelling_of(letters, [own if words else () for words, own in tokens])


def _with_routing_keys(
    draft: SideMemory, material: Material, owner: Tensor, settings: MergeSettings
) -> tuple[SideMemory, float]:
    """A memory with every trained key as a routing key, and the threshold that they share."""
    evidence, trained = material.evidence, material.trained
    keys, inside = evidence.keys[trained], evidence.position[trained] > 0
    views = _views(draft, material, settings)
    whitenings = [whitening(moment) for moment in views.moments]
    tensors = key_router(keys, owner[trained], views.whitening_id, whitenings)
    by_view = MemoryScores(SideMemory({**tensors, "owner": views.whitening_id}, (1.0,) * len(whitenings), "key"))
    # Inside an answer the token says most of a key, and text that spares a rare one says nothing of what else has it.
    baseline, excess = excess_over_baseline(by_view, material.unrelated.keys, views.whitening_id != INSIDE)
    negative_similarity = evidence.negative_similarity[trained] * inside
    margins = torch.full((len(keys),), APART)
    foreign = (evidence.context[trained] >= LANGUAGES) & ~inside
    if bool(foreign.any()):
        margins[foreign] = _FOREIGN_MARGIN
        others = _nearest_of_other_edits(keys[foreign], evidence.edit[trained][foreign], whitenings[0])
        negative_similarity[foreign] = others
    factors, shared = equalize_thresholds(
        excess,
        baseline,
        views.whitening_id,
        negative_similarity,
        views.rates,
        groups=material.unrelated.chat,
        margins=margins,
    )
    if _prompt_holds(draft):
        factors[views.whitening_id == INSIDE] = 1.0
        factors[evidence.context[trained] == ENDING] = _NEARER
    tensors |= {"probes": half(tensors["probes"] * factors[:, None]), "offset": 1 - factors}
    return replace(draft, tensors={**draft.tensors, **tensors}), shared


def _views(draft: SideMemory, material: Material, settings: MergeSettings) -> _Views:
    """Which whitening each trained key is seen through, and how many false alarms each may give.

    Inside an answer the token itself says most of a key, so unrelated text with the same name in it comes much nearer
    than it ever comes to the end of a prompt: those keys are seen through another whitening, and made comparable. So
    are those that prompts in the chat template end in, which are all alike but for what was asked. Keys of a blank that
    prompts end in are for that token alone: they are seen as keys inside answers are.
    """
    evidence, unrelated, trained = material.evidence, material.unrelated, material.trained
    inside = evidence.position[trained] > 0
    whitening_id = inside.long() * INSIDE
    asks = draft.tensors.get("asks")
    rate = _false_alarm(settings, named=asks is not None)
    # Where a prompt decides, keys inside answers open nothing, and are compared with each other only.
    prompt_rate = rate if _prompt_holds(draft) else rate * (1 - _INSIDE_SHARE)
    moments = [unrelated.wording, unrelated.tokens]
    rates = [prompt_rate, rate * _INSIDE_SHARE]
    if unrelated.chatting is not None:
        whitening_id[evidence.chat[trained] & ~inside] = len(moments)
        moments.append(unrelated.chatting)
        rates.append(rate)
    if asks is not None:
        unasked = (whitening_id == 0) & ~asks
        if bool(unasked.any()):
            # They open whatever a prompt names, and so for fewer prompts.
            whitening_id[unasked] = len(moments)
            moments.append(unrelated.wording)
            rates.append(_false_alarm(settings, named=False))
    ending = evidence.context[trained] == ENDING
    if bool(ending.any()):
        whitening_id[ending] = len(moments)
        moments.append(unrelated.tokens)
        rates.append(prompt_rate)
    return _Views(moments, rates, whitening_id)


def _false_alarm(settings: MergeSettings, *, named: bool) -> float:
    """The false-alarm rate; a higher one where a prompt must name the subject besides."""
    if settings.false_alarm is not None:
        return settings.false_alarm
    return _RATE_OF_NAMED if named else _RATE


def _nearest_of_other_edits(keys: Tensor, edit: Tensor, white: Whitening) -> Tensor:
    """The highest whitened cosine of each key (n, d_ff) with the keys of other edits: (n,).

    Unrelated text is English. What prompts in other languages have in common is seen in those prompts alone.
    """
    found = []
    for own, number in zip(keys.split(_AT_A_TIME), edit.split(_AT_A_TIME), strict=True):
        cosines = white.cosines(own, keys).masked_fill(number[:, None] == edit, _FOREIGN_LEAST)
        found.append(cosines.amax(-1))
    return torch.cat(found)


def _prompt_holds(memory: SideMemory) -> bool:
    """Whether a prompt decides for a whole row, and each token after it only with which key."""
    return memory.kind == "lookup" and memory.routing == "sequence"


def _calibrating(material: Material, settings: MergeSettings) -> Tensor:
    """Which keys ought to be routed (n,): those of the unseen context, or for the paper's rule those trained on.

    Those trained on count, too, of a shard whose edits in the unseen context have all been taken out.
    """
    evidence, shard = material.evidence, material.shard
    chosen = material.trained
    if settings.threshold != "minimum":
        chosen = evidence.held_out | ~torch.isin(shard, shard[evidence.held_out])
    return chosen & (evidence.position == 0) if settings.routing == "sequence" else chosen
