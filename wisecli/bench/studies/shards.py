"""Mask ratio ρ against number of shards k (the paper's analysis of both, section 3.3).

All k masks overlap in a share ρᵏ of the matrix. Where that is about .03, the paper found, shards have room of their own
and still something to be joined by.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import QUALITIES, by_edits
from wisecli.bench.studies.study_context import StudyContext, numbers_in
from wisecli.errors import SettingsError

OVERLAP = 0.03
_SMALLEST_RATIO, _MOST_SHARDS = 1e-6, 10**6


@study("shards")
class Shards:
    """The mean of reliability, generalization and locality over a grid of ρ and k, merged by plain TIES."""

    title = "Mask ratio and number of shards"
    caption = (
        "The same edits in k shards of mask ratio ρ, merged into one matrix by TIES and nothing else. In colour the "
        "mean of reliability, generalization and locality; the line is where k masks overlap in 3 %: ρᵏ = .03."
    )
    columns = ("mean", *QUALITIES)

    def points(self, context: StudyContext) -> list[Point]:
        """Return the grid, for every number of edits; there is an edit for every shard."""
        ratios = numbers_in(context.settings.mask_ratios, "mask_ratios", float, _SMALLEST_RATIO, 1.0)
        shards = numbers_in(context.settings.shard_counts, "shard_counts", int, 1, _MOST_SHARDS)
        if shards[0] > context.counts[0]:
            raise SettingsError(
                f"--set shard_counts={context.settings.shard_counts}: more than the {context.counts[0]} edits"
            )
        return [
            {"edits": count, "mask_ratio": ratio, "shards": number}
            for count in context.counts
            for ratio in ratios
            for number in shards
            if number <= count
        ]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return what `wise eval` says, and the mean."""
        shards = context.shards(point["edits"], mask_ratio=point["mask_ratio"], shards=point["shards"], mode="merge")
        figures = context.figures(context.memory(shards, mode="merge", method="ties", refit=False), point["edits"])
        known = [figures[name] for name in QUALITIES if name in figures]
        return {"mean": sum(known) / len(known), **figures}

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw a heat map for each number of edits."""
        grouped = by_edits(rows)
        lowest = min(row["figures"]["mean"] for row in rows) - 0.02
        figure.set_size_inches(6.5 * len(grouped), 4.6)
        panels = figure.subplots(1, len(grouped), squeeze=False)[0]
        for (count, own), panel in zip(grouped.items(), panels, strict=True):
            mesh = _heat(panel, own, lowest)
            panel.set_title(f"{count} edits", loc="left")
            panel.set_title("— ρᵏ = .03", loc="right", color="tab:red")
            panel.set(xlabel="shards k", ylabel="mask ratio ρ")
        # As a gradient of rectangles: rasterized it would be an image inside the picture.
        figure.colorbar(mesh, ax=panels, label="mean of the three").solids.set(rasterized=False, edgecolor="face")


def overlap_curve(shards: Sequence[float]) -> list[float]:
    """Return, by the number k of shards, the mask ratio ρ at which all masks overlap in ρᵏ = .03 of the matrix."""
    return [float(OVERLAP ** (1 / number)) for number in shards]


def _heat(panel: Any, rows: Sequence[ResultRow], lowest: float) -> Any:
    """Draw cells with their means in them, each as wide as its neighbours are far away, and the line."""
    across, up = (sorted({row[name] for row in rows}) for name in ("shards", "mask_ratio"))
    found = {(row["mask_ratio"], row["shards"]): row["figures"]["mean"] for row in rows}
    means = [[found[ratio, number] for number in across] for ratio in up]
    edges = _edges(across), _edges(up)
    mesh = panel.pcolormesh(*edges, means, cmap="viridis", vmin=lowest, vmax=1)
    for (ratio, number), mean in found.items():
        cell = mesh.to_rgba(mean)
        colour = "white" if mean < (lowest + 1) / 2 else "black"
        around = {"facecolor": cell, "edgecolor": "none", "pad": 1.5}  # the line passes below the number
        panel.text(number, ratio, f"{mean:.2f}", ha="center", va="center", fontsize=8, color=colour, bbox=around)
    left, right = edges[0][0], edges[0][-1]
    fine = [left + (right - left) * index / 400 for index in range(401)]
    panel.plot(fine, overlap_curve(fine), color="tab:red", linewidth=2)
    panel.set(xlim=(left, right), ylim=(edges[1][0], edges[1][-1]))
    panel.set_xticks(across)
    panel.set_yticks(up)
    return mesh


def _edges(centres: Sequence[float]) -> list[float]:
    """Return the n + 1 borders of cells around n places above zero, half-way between them."""
    between = [(low + high) / 2 for low, high in pairwise([0, *centres])]
    lowest = max(between[0], centres[0] - (between[1] - centres[0]) if len(centres) > 1 else 0)
    return [lowest, *between[1:], 2 * centres[-1] - between[-1]]
