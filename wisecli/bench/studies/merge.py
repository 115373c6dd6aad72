"""The same edits merged in every way that `wise merge` has (the paper compares merging methods in its appendix)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import QUALITIES, by_edits
from wisecli.bench.studies.study_context import StudyContext
from wisecli.memory.merging.merge_methods import METHODS
from wisecli.memory.merging.merger import EXACT


class Way(NamedTuple):
    """One way to merge: settings of `wise merge`, what is ``None`` as by default."""

    mode: str
    method: str | None = None
    refit: bool | None = None


def ways() -> dict[str, Way]:
    """Return every way to merge, by the name that the table has for it."""
    plain = {name: Way("merge", name, refit=False) for name in sorted(METHODS)}
    refitted = {f"{name}+refit": way._replace(refit=True) for name, way in plain.items()}
    return {**plain, **refitted, EXACT: Way("merge", EXACT), "retrieve": Way("retrieve"), "lookup": Way("lookup")}


@study("merge")
class Merge:
    """Reliability, generalization and locality of every way to merge."""

    title = "Ways to merge"
    caption = (
        "The same edits merged in every way there is. +refit: a ridge solve around what the method gives; exact: one "
        "solve over the statistics of all shards; retrieve keeps a matrix a shard, lookup every key."
    )
    columns = (*QUALITIES, "routing", "megabytes")

    def points(self, context: StudyContext) -> list[Point]:
        """Return every way, for every number of edits."""
        return [
            {"edits": count, "shards": context.several(count), "way": way} for count in context.counts for way in ways()
        ]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return what `wise eval` says, and the memory's size."""
        way = ways()[point["way"]]
        shards = context.shards(point["edits"], shards=point["shards"], mode="merge")
        memory = context.memory(shards, mode=way.mode, method=way.method, refit=way.refit)
        size = sum(path.stat().st_size for path in memory.iterdir())
        return {**context.figures(memory, point["edits"]), "megabytes": size / 1e6}

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw bars for each way, a panel for each number of edits."""
        grouped = by_edits(rows)
        most = max(map(len, grouped.values()))
        figure.set_size_inches(max(8, 5.5 * len(grouped)), 1.2 + 0.42 * most)
        panels = figure.subplots(1, len(grouped), squeeze=False, sharey=True)[0]
        for (count, own), panel in zip(grouped.items(), panels, strict=True):
            for number, (name, colour) in enumerate(QUALITIES.items()):
                places = [index + 0.27 * (number - 1) for index in range(len(own))]
                panel.barh(places, [row["figures"].get(name, 0) for row in own], 0.25, color=colour, label=name)
            panel.set_yticks(range(len(own)), labels=[row["way"] for row in own])
            panel.set(title=f"{count} edits in {own[0]['shards']} shards", xlim=(0, 1), ylim=(len(own) - 0.5, -0.5))
            panel.grid(alpha=0.3, axis="x")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
