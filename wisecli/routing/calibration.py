"""Router thresholds: the key router's tensors, and where between edits and unrelated text a threshold lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.routing.scores import MemoryScores
from wisecli.routing.whitening import Whitening

# How much nearer than its hard negatives a key must come, and how near is always near enough.
APART, _SURE = 0.02, 0.97
# So many background keys of each half, those nearest to a routing key, say how near such usually come to it.
_NEAREST = 8
# Keys of one text lie together, and belong in one half: halves are made of so many stretches.
_STRETCHES = 64
# Below any difference of two cosines.
_BELOW = -2.0
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Calibration:
    """A router threshold, the rule that found it, and quantiles of the scores on both sides of it.

    ``misses`` is the share of the edits' scores under unseen contexts that stay below; ``false_alarms`` that of
    unrelated text above, None if what such text scores is not known.
    """

    threshold: float
    rule: str
    misses: float
    false_alarms: float | None
    edit_scores: dict[str, float]
    unrelated_scores: dict[str, float]


def calibrate(
    edit_scores: Tensor, background_scores: Tensor, *, rule: str, false_alarm: float, groups: Tensor | None = None
) -> Calibration:
    """A router threshold ε between the scores of edits (n,) and those of unrelated text (m,).

    Args:
        rule: ``false-alarm`` lets a share ``false_alarm`` of unrelated tokens through; ``minimum`` is the lowest score
            of any edit (WISE, section 2.3.1).
        groups: of unrelated text (m,), each of which has the rate to itself; one by default.
    """
    if rule == "minimum":
        found = float(edit_scores.min() * (1 - 1e-6))
    else:
        found = highest_quantile(background_scores, 1 - false_alarm, groups)
    # The router compares by factors: no threshold may be zero.
    return measure(edit_scores, background_scores, max(found, 1e-6), rule=rule)


def measure(edit_scores: Tensor, background_scores: Tensor | None, threshold: float, *, rule: str) -> Calibration:
    """What a given threshold does to the scores of edits (n,) and of unrelated text (m,), if those are known."""
    misses = float((edit_scores <= threshold).float().mean())
    if background_scores is None:
        return Calibration(threshold, rule, misses, None, _summary(edit_scores), {})
    alarms = float((background_scores > threshold).float().mean())
    return Calibration(threshold, rule, misses, alarms, _summary(edit_scores), _summary(background_scores))


def highest_quantile(values: Tensor, share: float, groups: Tensor | None) -> float:
    """The highest of the groups' quantiles of values (n,)."""
    if groups is None:
        return quantile(values, share)
    return max(quantile(values[groups == group], share) for group in groups.unique().tolist())


def quantile(values: Tensor, share: float) -> float:
    """A quantile of any number of values (torch's own stops at 16 million)."""
    ordered = values.flatten().float().sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _summary(scores: Tensor) -> dict[str, float]:
    return {f"{share:g}": round(quantile(scores, share), 6) for share in _QUANTILES}


def key_router(keys: Tensor, owner: Tensor, whitening_id: Tensor, whitenings: Sequence[Whitening]) -> dict[str, Tensor]:
    """The tensors of a key router, by their names in a side memory.

    Args:
        keys: of the edits (n, d_ff).
        owner: the memory that each key opens (n,).
        whitening_id: the whitening that each key is seen through (n,).
        whitenings: those whitenings, of equal rank.
    """
    probes = torch.empty_like(keys)
    for number, white in enumerate(whitenings):
        probes[whitening_id == number] = white.probes(keys[whitening_id == number])
    return {
        "probes": probes,
        "offset": torch.zeros(len(keys)),
        "owner": owner,
        "metric": whitening_id,
        "directions": torch.stack([white.directions for white in whitenings]),
        "gains": torch.stack([white.gains for white in whitenings]),
        "floors": torch.tensor([white.floor for white in whitenings]),
    }


def equalize_thresholds(
    excess: Tensor,
    baseline: Tensor,
    whitening_id: Tensor,
    negative_similarity: Tensor,
    rates: Sequence[float],
    *,
    groups: Tensor | None = None,
    margins: Tensor | float = APART,
) -> tuple[Tensor, float]:
    """Factors f (n,) with which ``1 - f (1 - cosine)`` lets all routing keys share one threshold, and that threshold.

    A key itself scores 1 whatever its own threshold is, so that of several open keys the one that fits best is nearest.

    Args:
        excess: by how much each background key exceeds the baseline at most, under every whitening (m, w).
        baseline: how near background keys usually come to each routing key (n,); its threshold is counted from there.
        whitening_id: the whitening of each routing key (n,).
        negative_similarity: how near a routing key comes to hard negatives of its edit (n,), 0 where there are none.
        rates: the false-alarm rate of each whitening's routing keys.
        groups: of background keys (m,), each of which has the rate to itself; one by default.
        margins: how much nearer than its hard negatives a key must come, (n,) or one for all.
    """
    columns = zip(excess.T, rates, strict=True)
    levels = torch.tensor([highest_quantile(column, 1 - rate, groups) for column, rate in columns])
    thresholds = (levels[whitening_id] + baseline).clamp(min=1e-6, max=_SURE)
    shared = float(thresholds[whitening_id == whitening_id.min()].mean())
    apart = (negative_similarity + margins).clamp(max=_SURE) * (negative_similarity > 0)
    thresholds = torch.maximum(thresholds, apart)
    return (1 - shared) / (1 - thresholds), shared


def excess_over_baseline(
    router: MemoryScores, background: Tensor, counted: Tensor, *, batch: int = 1024
) -> tuple[Tensor, Tensor]:
    """How near background keys usually come to each routing key (n,), and by how much each exceeds that (m, w).

    Prompts that end as text in general does have unrelated text near them, others none. Either half of the background
    keys (m, d_ff) is compared with what the other makes usual: by its own it would look less near than keys to come.

    Args:
        router: the routing keys, each under one of w whitenings; excesses are the highest under each.
        counted: the routing keys that have a baseline (n,); that of all others is 0.
    """
    half = torch.arange(len(background)) * _STRETCHES // max(len(background), 1) % 2 == 0
    baselines = torch.stack([_mean_of_nearest(router, background[own], batch) * counted for own in (half, ~half)])
    excess = background.new_empty(len(background), len(router.floors))
    for own, other in ((half, baselines[1]), (~half, baselines[0])):
        excess[own] = _excess(router, background[own], other, batch)
    return baselines.mean(0), excess


def _mean_of_nearest(router: MemoryScores, keys: Tensor, batch: int) -> Tensor:
    """The mean of each routing key's highest cosines with keys (m, d_ff): (n,)."""
    highest = keys.new_empty(0, len(router.probes))
    for part in keys.split(batch):
        seen = torch.cat([highest, router.cosines(part)])
        highest = seen.topk(min(_NEAREST, len(seen)), 0).values
    return highest.sum(0) / max(len(highest), 1)


def _excess(router: MemoryScores, keys: Tensor, baseline: Tensor, batch: int) -> Tensor:
    found = [keys.new_empty(0, len(router.floors))]
    for part in keys.split(batch):
        above = router.cosines(part) - baseline
        lowest = above.new_full((len(above), len(router.floors)), _BELOW)
        found.append(lowest.scatter_reduce(1, router.metric.expand_as(above), above, "amax"))
    return torch.cat(found)


def scores_of(router: MemoryScores, keys: Tensor, *, batch: int = 4096) -> Tensor:
    """Scores (n, M) of many keys (n, d_ff), a slice at a time."""
    return torch.cat([router.scores(part) for part in keys.split(batch)])
