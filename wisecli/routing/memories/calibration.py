"""Router thresholds, where between edits and unrelated text they lie."""

from dataclasses import dataclass, field

from torch import Tensor

_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Calibration:
    """A router threshold, the rule that found it, and quantiles of the scores on both sides of it.

    ``misses`` is the share of the edits' scores under unseen contexts that stay below; ``false_alarms`` that of
    unrelated text above, None if what such text scores is not known; ``mentioned`` that of prompts that mention a
    made-up fact, don't ask it, and open it all the same, None if that was not measured.
    """

    threshold: float
    rule: str
    misses: float
    false_alarms: float | None
    edit_scores: dict[str, float]
    unrelated_scores: dict[str, float]
    mentioned: float | None = field(default=None, kw_only=True)


def calibrate(
    edit_scores: Tensor, background_scores: Tensor, *, rule: str, false_alarm: float, groups: Tensor | None = None
) -> Calibration:
    """Return a router threshold ε between the scores of edits (n,) and those of unrelated text (m,).

    Args:
        rule: ``false-alarm`` lets a share ``false_alarm`` of unrelated tokens through; ``minimum`` is the lowest score
            of any edit (WISE, section 2.3.1).
        groups: of unrelated text (m,), each of which has the rate to itself; one by default.
    """
    if rule == "minimum":
        threshold = float(edit_scores.min() * (1 - 1e-6))
    else:
        threshold = highest_quantile(background_scores, 1 - false_alarm, groups)
    # The router compares by factors: no threshold may be zero.
    return measure(edit_scores, background_scores, max(threshold, 1e-6), rule=rule)


def measure(edit_scores: Tensor, background_scores: Tensor | None, threshold: float, *, rule: str) -> Calibration:
    """Return what a given threshold does to the scores of edits (n,) and of unrelated text (m,), if those are known."""
    misses = float((edit_scores <= threshold).float().mean())
    if background_scores is None:
        return Calibration(threshold, rule, misses, None, _summary(edit_scores), {})
    alarms = float((background_scores > threshold).float().mean())
    return Calibration(threshold, rule, misses, alarms, _summary(edit_scores), _summary(background_scores))


def highest_quantile(values: Tensor, share: float, groups: Tensor | None) -> float:
    """Return the highest of the groups' quantiles of values (n,)."""
    if groups is None:
        return quantile(values, share)
    return max(quantile(values[groups == group], share) for group in groups.unique().tolist())


def quantile(values: Tensor, share: float) -> float:
    """Return a quantile of any number of values (torch's own stops at 16 million)."""
    ordered = values.flatten().float().sort().values
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))


def _summary(scores: Tensor) -> dict[str, float]:
    return {f"{share:g}": round(quantile(scores, share), 6) for share in _QUANTILES}
