"""The same edits at each of several layers (the paper's localization analysis, section 3.3)."""

from collections.abc import Sequence
from typing import Any

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import QUALITIES, SHARES, by_edits, line
from wisecli.bench.studies.study_context import StudyContext
from wisecli.editing.background.layer_selection import candidates
from wisecli.models.layout.architectures import layer_count


@study("layers")
class Layers:
    """Reliability, generalization and locality against the edited layer."""

    title = "Which layer"
    caption = (
        "The same edits written at each of several layers, as the defaults write and merge them. Half of the layers "
        "are among those that --layer auto looks at (shaded), the others lie evenly below."
    )
    columns = (*QUALITIES, "routing")

    def points(self, context: StudyContext) -> list[Point]:
        """Return every layer chosen, for every number of edits."""
        layers = chosen(layer_count(context.directory), context.settings.layers)
        return [{"edits": count, "layer": layer} for count in context.counts for layer in layers]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return what `wise eval` says, and whether `--layer auto` looks at this layer."""
        shards = context.shards(point["edits"], layer=str(point["layer"]))
        probed = point["layer"] in candidates(layer_count(context.directory))
        return {**context.figures(context.memory(shards), point["edits"]), "probed": probed}

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw a panel for each number of edits."""
        grouped = by_edits(rows)
        figure.set_size_inches(max(7, 5 * len(grouped)), 4)
        panels = figure.subplots(1, len(grouped), squeeze=False, sharey=True)[0]
        for (count, own), panel in zip(grouped.items(), panels, strict=True):
            probed = [row["layer"] for row in own if row["figures"]["probed"]]
            if probed:
                panel.axvspan(min(probed) - 0.5, max(probed) + 0.5, color="tab:gray", alpha=0.12, label="--layer auto")
            for name, colour in QUALITIES.items():
                line(panel, own, "layer", name, color=colour, label=name)
            panel.set(title=f"{count} edits", xlabel="layer", ylim=SHARES)
            panel.set_xticks(sorted(row["layer"] for row in own))
            panel.grid(alpha=0.3)
        panels[-1].legend(fontsize=8, loc="lower left")


def chosen(count: int, number: int) -> list[int]:
    """Return ``number`` of the layers that can be edited, of ``count``: half of them where `--layer auto` looks.

    The first has none below it, where prompts could be read.
    """
    probed = candidates(count)
    high = [probed[round(index)] for index in _spread(len(probed) - 1, min(len(probed), (number + 1) // 2))]
    below = min(probed.start - 1, number - len(high))
    return [1 + index * (probed.start - 1) // below for index in range(below)] + high


def _spread(last: int, number: int) -> list[float]:
    """Return ``number`` places from 0 to ``last``, both included; a single one is in the middle."""
    return [last / 2] if number == 1 else [last * index / (number - 1) for index in range(number)]
