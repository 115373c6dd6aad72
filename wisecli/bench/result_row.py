"""A row of `wise bench`: figures of one method after so many edits, with intervals, by age and by dataset."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wisecli.environment import peak_rss_bytes, peak_vram_bytes

_SHARE = 0.95
# Of so many edits, the oldest, there is a figure of their own: it falls where edits are forgotten.
_FIRST = 100

ResultRow = dict[str, Any]
Each = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Peaks:
    """The most memory that was held, in bytes: of the process, and of a GPU (0 without one)."""

    rss: int = 0
    vram: int = 0

    def and_now(self) -> Peaks:
        """Return the larger of these peaks and those since :func:`forget_peaks`."""
        return Peaks(max(self.rss, peak_rss_bytes()), max(self.vram, peak_vram_bytes()))


@dataclass(frozen=True)
class RowMaker:
    """Makes rows; ``domains`` names the dataset of each edit, ``resamples`` and ``seed`` are of the bootstrap."""

    domains: Sequence[str]
    resamples: int
    seed: int

    def row(
        self,
        name: str,
        count: int,
        *,
        after: Mapping[str, float],
        before: Mapping[str, float],
        each: Each,
        costs: Mapping[str, float],
        peaks: Peaks,
    ) -> ResultRow:
        """Return figures, intervals and every edit's own figure, oldest first: as taught by WILD, or else reliability.

        Args:
            each: of each figure the edits' values, by their places.
        """
        early = [(index, value) for index, value in each.get("wild_as_taught", ()) if index < _FIRST]
        if early:
            each = {**each, f"first_{_FIRST}": early}
            after = {**after, f"first_{_FIRST}": statistics.fmean(value for _, value in early)}
        intervals = {
            figure: interval([value for _, value in values], resamples=self.resamples, seed=self.seed)
            for figure, values in each.items()
        }
        figures = {**after, "before": dict(before), "intervals": intervals, **costs}
        aged = each.get("wild_as_taught") or each.get("reliability", ())
        figures |= {"peak_rss_bytes": peaks.rss, "by_age": [value for _, value in aged]}
        if peaks.vram:
            figures["peak_vram_bytes"] = peaks.vram
        if len(set(self.domains)) > 1:
            figures["domains"] = self._by_domain(each)
        return {"method": name, "edits": count, "figures": json.loads(json.dumps(figures))}

    def _by_domain(self, each: Each) -> dict[str, dict[str, float]]:
        """Return every figure's mean over the edits of one dataset."""
        found: dict[str, dict[str, float]] = {}
        for figure, values in each.items():
            for domain in dict.fromkeys(self.domains):
                own = [value for index, value in values if self.domains[index] == domain]
                if own:
                    found.setdefault(domain, {})[figure] = statistics.fmean(own)
        return found


def interval(values: Sequence[float], *, resamples: int, seed: int) -> tuple[float, float]:
    """Return the bootstrap interval (95 %) of a mean over edits, by percentiles."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    cut = round((1 - _SHARE) / 2 * (len(means) - 1))
    return means[cut], means[len(means) - 1 - cut]
