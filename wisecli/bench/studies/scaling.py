"""More and more edits, kept in each way, and how much of what is lost is the router's (section 3.3: scaling up).

The paper's oracle: the memory that holds an edit answers whenever it is asked for, so that only the writing can fail.
"""

from collections.abc import Sequence
from typing import Any

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import MODES, SHARES, counted, line
from wisecli.bench.studies.study_context import StudyContext

_ORACLE = ("reliability", "generalization")
_PANELS = (*_ORACLE, "locality", "routing")


@study("scaling")
class Scaling:
    """Figures against the number of edits, and the same with an oracle in the router's place."""

    title = "Scaling"
    caption = (
        "The same edits as a lookup, as a matrix each (retrieve) and merged into one (merge), as edits become more. "
        "Dashed: an oracle opens the memory that holds the edit, of a lookup the edit's own keys, whatever the router "
        "says. Routing: share of rephrases that open it by themselves."
    )
    columns = (*_PANELS, *(f"oracle_{name}" for name in _ORACLE))

    def points(self, context: StudyContext) -> list[Point]:
        """Return every way to keep edits, for every number of them."""
        return [
            {"edits": count, "shards": context.several(count), "mode": mode}
            for count in context.counts
            for mode in MODES
        ]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return what `wise eval` says, with the router and with the oracle."""
        shards = context.shards(point["edits"], shards=point["shards"], mode=point["mode"])
        memory = context.memory(shards, mode=point["mode"])
        best = context.figures(memory, point["edits"], oracle=True)
        oracle = {f"oracle_{name}": best[name] for name in _ORACLE if name in best}
        return {**context.figures(memory, point["edits"]), **oracle}

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw a panel for each figure, a line for each way."""
        figure.set_size_inches(13, 3.8)
        for panel, name in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS, strict=True):
            for mode, style in MODES.items():
                own = [row for row in rows if row["mode"] == mode]
                line(panel, own, "edits", name, label=mode, **style)
                line(panel, own, "edits", f"oracle_{name}", linestyle="--", mfc="white", **{**style, "linewidth": 1})
            if name in _ORACLE:
                panel.plot([], [], color="tab:gray", linestyle="--", marker="o", mfc="white", label="oracle")
            panel.set(title=name, ylim=SHARES)
            counted(panel, sorted({row["edits"] for row in rows}))
            panel.legend(fontsize=8, loc="lower left")
