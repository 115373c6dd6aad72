"""What pictures of several studies have in common."""

from collections.abc import Sequence
from typing import Any

from wisecli.bench.result_row import ResultRow

# The paper's three measures, and in which colour each is drawn wherever they stand side by side.
QUALITIES = {"reliability": "tab:blue", "generalization": "tab:orange", "locality": "tab:green"}
# The ways to keep edits, each drawn thinner than the one before: lines that lie on each other can all be seen.
MODES: dict[str, dict[str, Any]] = {
    "lookup": {"color": "tab:blue", "linewidth": 4.5, "markersize": 10},
    "retrieve": {"color": "tab:orange", "linewidth": 2.8, "markersize": 7},
    "merge": {"color": "tab:green", "linewidth": 1.2, "markersize": 4},
}
SHARES = (-0.03, 1.03)


def by_edits(rows: Sequence[ResultRow]) -> dict[int, list[ResultRow]]:
    """Return rows of each number of edits, in rising order."""
    return {count: [row for row in rows if row["edits"] == count] for count in sorted({row["edits"] for row in rows})}


def line(axis: Any, rows: Sequence[ResultRow], along: str, figure: str, **style: Any) -> None:
    """Draw one figure against one setting, over the rows that have it."""
    own = sorted((row for row in rows if figure in row["figures"]), key=lambda row: row[along])
    axis.plot([row[along] for row in own], [row["figures"][figure] for row in own], marker="o", **style)


def counted(axis: Any, counts: Sequence[int]) -> None:
    """Put the numbers of edits along the axis, each where it is and as it is written."""
    if len(counts) > 1:
        axis.set_xscale("log")
    axis.set_xticks(counts, labels=[str(count) for count in counts], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("edits")
    axis.grid(alpha=0.3)
