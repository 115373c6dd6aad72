"""Where the router's thresholds are decided: the key router, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wisecli.routing.whitening import Whitening

# How much nearer than to its answer's own tokens elsewhere a key must be, and how near is always near enough.
APART, _SURE = 0.02, 0.97
# So many unrelated keys of each half, those nearest to a probe, say how near such usually come to it.
_NEAREST = 8
# Keys of one text lie together, and belong in one half: halves are made of so many stretches.
_STRETCHES = 64
# Below any difference of two cosines.
_BELOW = -2.0
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Calibration:
    """A threshold, how it was found, and the scores on both sides of it.

    ``misses`` is the share of the edits' scores under unseen contexts that stay below; ``false_alarms`` that of
    unrelated text above.
    """

    threshold: float
    rule: str
    misses: float
    false_alarms: float
    edit_scores: dict[str, float]
    unrelated_scores: dict[str, float]


def calibrate(
    edits: Tensor, unrelated: Tensor, *, rule: str, false_alarm: float, kinds: Tensor | None = None
) -> Calibration:
    """Decide ε from scores of edits (n,) and of unrelated text (m,).

    Args:
        rule: ``false-alarm`` lets a share ``false_alarm`` of unrelated tokens through; ``minimum`` is the lowest score
            of any edit (the paper, section 3.1).
        kinds: of unrelated text (m,), each of which has the rate to itself; one by default.
    """
    found = float(edits.min() * (1 - 1e-6)) if rule == "minimum" else strictest(unrelated, 1 - false_alarm, kinds)
    return measure(edits, unrelated, max(found, 1e-6), rule=rule)  # the router compares by factors: none may be zero


def measure(edits: Tensor, unrelated: Tensor, threshold: float, *, rule: str) -> Calibration:
    """What a threshold that was decided elsewhere does to scores of edits (n,) and of unrelated text (m,)."""
    misses = float((edits <= threshold).float().mean())
    alarms = float((unrelated > threshold).float().mean())
    return Calibration(threshold, rule, misses, alarms, _summary(edits), _summary(unrelated))


def strictest(values: Tensor, share: float, kinds: Tensor | None) -> float:
    """The highest of the quantiles of each kind's values (n,)."""
    if kinds is None:
        return quantile(values, share)
    return max(quantile(values[kinds == kind], share) for kind in kinds.unique().tolist())


def quantile(values: Tensor, share: float) -> float:
    """A quantile of any number of values (torch's own stops at 16 million)."""
    ordered = values.flatten().float().sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _summary(scores: Tensor) -> dict[str, float]:
    return {f"{share:g}": round(quantile(scores, share), 6) for share in _QUANTILES}


def key_router(keys: Tensor, owner: Tensor, metric: Tensor, metrics: Sequence[Whitening]) -> dict[str, Tensor]:
    """Tensors of the key router.

    Args:
        keys: of the edits (n, d_ff), with the memory that each opens, ``owner`` (n,), and the whitening it is seen
            through, ``metric`` (n,).
        metrics: the whitenings, of equal rank.
    """
    probes = torch.empty_like(keys)
    for number, white in enumerate(metrics):
        probes[metric == number] = white.probes(keys[metric == number])
    return {
        "probes": probes,
        "offset": torch.zeros(len(keys)),
        "owner": owner,
        "metric": metric,
        "directions": torch.stack([white.directions for white in metrics]),
        "gains": torch.stack([white.gains for white in metrics]),
        "floors": torch.tensor([white.floor for white in metrics]),
    }


def even_out(
    peaks: Tensor,
    usual: Tensor,
    metric: Tensor,
    elsewhere: Tensor,
    shares: Sequence[float],
    *,
    kinds: Tensor | None = None,
    margins: Tensor | float = APART,
) -> tuple[Tensor, float]:
    """Factors f (n,) with which ``1 - f (1 - cosine)`` lets all keys share one threshold, and that threshold.

    A key itself scores 1 whatever its own bar is, so that of several open probes the one that fits best is nearest.

    Args:
        peaks: by how much each unrelated key exceeds ``usual`` at most, at probes of every metric (m, w).
        usual: how near unrelated keys come to each probe (n,), from where its bar is counted.
        metric: of each probe (n,).
        elsewhere: how near a probe comes to what is like it and not its own (n,), 0 where that is not known.
        shares: of unrelated keys of a kind, that each metric lets through on its own.
        kinds: of unrelated text (m,); one by default.
        margins: how much nearer than that a key must come, (n,) or one for all.
    """
    levels = torch.tensor([strictest(peak, 1 - share, kinds) for peak, share in zip(peaks.T, shares, strict=True)])
    bars = (levels[metric] + usual).clamp(min=1e-6, max=_SURE)
    shared = float(bars[metric == metric.min()].mean())
    bars = torch.maximum(bars, (elsewhere + margins).clamp(max=_SURE) * (elsewhere > 0))
    return (1 - shared) / (1 - bars), shared


def peaks_above_usual(
    routed: Any, keys: Tensor, counted: Tensor, metric: Tensor, count: int, *, batch: int = 1024
) -> tuple[Tensor, Tensor]:
    """How near unrelated keys (m, d_ff) usually come to each probe (n,), and by how much each exceeds that (m, count).

    Prompts that end as text in general does have unrelated text near them, others none. Either half of the keys is
    compared with what the other makes usual: by its own it would look less near than keys to come will be.

    Args:
        counted: the probes of which this is asked (n,); of all others it is 0.
        metric: of each probe (n,), one of ``count``; excesses are the highest of each.
    """
    half = torch.arange(len(keys)) * _STRETCHES // max(len(keys), 1) % 2 == 0
    usual = torch.stack([_highest(routed, keys[own], batch) * counted for own in (half, ~half)])
    peaks = keys.new_empty(len(keys), count)
    for own, other in ((half, usual[1]), (~half, usual[0])):
        peaks[own] = _peaks_above(routed, keys[own], other, metric, count, batch)
    return usual.mean(0), peaks


def _highest(routed: Any, keys: Tensor, batch: int) -> Tensor:
    """The mean of each probe's highest cosines with keys (m, d_ff): (n,)."""
    highest = keys.new_empty(0, len(routed.probes))
    for part in keys.split(batch):
        seen = torch.cat([highest, routed.cosines(part)])
        highest = seen.topk(min(_NEAREST, len(seen)), 0).values
    return highest.sum(0) / max(len(highest), 1)


def _peaks_above(routed: Any, keys: Tensor, usual: Tensor, metric: Tensor, count: int, batch: int) -> Tensor:
    found = [keys.new_empty(0, count)]
    for part in keys.split(batch):
        above = routed.cosines(part) - usual
        lowest = above.new_full((len(above), count), _BELOW)
        found.append(lowest.scatter_reduce(1, metric.expand_as(above), above, "amax"))
    return torch.cat(found)


def scores(routed: Any, keys: Tensor, *, batch: int = 4096) -> Tensor:
    """Scores (n, M) of many keys (n, d_ff), a slice at a time."""
    return torch.cat([routed.scores(part) for part in keys.split(batch)])
