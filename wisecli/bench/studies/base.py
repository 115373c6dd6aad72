"""What every study can do, so that all are kept, continued and shown in one way; and the table of studies by name.

A study lists its *points*, small dicts of settings that say which rows there are to be. Each is measured by itself, and
a row is a point with its ``figures``. What is drawn is drawn from rows alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from wisecli.bench.reporting.html_tables import Section
from wisecli.bench.reporting.plots import picture
from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.study_context import StudyContext
from wisecli.registry import Registry

Point = dict[str, Any]
Figures = dict[str, Any]


class Study(Protocol):
    """One analysis.

    ``title`` and ``caption`` stand over its table, whose columns are the points' settings and some of the figures.
    """

    title: str
    caption: str

    @property
    def columns(self) -> Sequence[str]:
        """Names of the figures that the table shows."""

    def points(self, context: StudyContext) -> list[Point]:
        """Return the rows that will be measured, from the settings and the model's ``config.json`` alone.

        Raises:
            SettingsError: the settings allow of none.
        """

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return the figures of one row."""

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw all rows into a figure of matplotlib."""


STUDIES: Registry[Study] = Registry("wisecli.studies")

_Made = TypeVar("_Made", bound=Callable[[], Study])


def study(name: str) -> Callable[[_Made], _Made]:
    """Put a study into the table."""

    def put(maker: _Made) -> _Made:
        STUDIES.add(name, maker())
        return maker

    return put


def section(study: Study, rows: Sequence[ResultRow], *, drawn: bool = True) -> Section:
    """Return a study's rows as part of a page: a table, and if wanted a picture, for which matplotlib must be there."""
    settings = [name for name in rows[0] if name != "figures"]
    heads = [name.replace("_", " ") for name in (*settings, *study.columns)]
    cells = [
        [*(str(row[name]) for name in settings), *(_number(row["figures"], name) for name in study.columns)]
        for row in rows
    ]
    return Section(study.title, study.caption, heads, cells, picture(study.draw, rows) if drawn else "")


def _number(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else ""
