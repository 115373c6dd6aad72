"""How figures are spoken of: of one memory, of methods side by side, of studies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from wisecli.bench.html import FIGURES, HEADS, costs
from wisecli.console import Console

if TYPE_CHECKING:
    from wisecli.bench.compare import BenchReport
    from wisecli.bench.study import StudyReport
    from wisecli.commands.evaluate import EvalReport


def tell_evaluation(console: Console, report: EvalReport) -> None:
    """Print what ``wise eval`` measured."""
    table = Table(title=f"{report.dataset}: {report.samples['edits']} edits")
    table.add_column("measure")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for name, after in report.after.items():
        table.add_row(name, f"{report.before[name]:.3f}", f"{after:.3f}")
    console.result(report.as_json(), table)


def tell_bench(console: Console, report: BenchReport) -> None:
    """Print what ``wise bench`` measured."""
    table = Table(title=f"{report.dataset}, edited by every method")
    for column in HEADS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in report.rows:
        figures = row["figures"]
        if "cannot" in figures:
            table.add_row(str(row["edits"]), row["method"], f"cannot run: {figures['cannot']}")
            continue
        shown = [f"{figures[name]:.3f}" if name in figures else "" for name in FIGURES]
        table.add_row(str(row["edits"]), row["method"], *shown, *costs(figures))
    console.result(report.as_json(), table)


def tell_study(console: Console, report: StudyReport) -> None:
    """Print the studies of ``wise bench``, a table each."""
    tables = []
    for section in report.sections():
        table = Table(title=section.title)
        for head in section.heads:
            table.add_column(head, justify="right", overflow="fold")
        for row in section.cells:
            table.add_row(*row)
        tables.append(table)
    console.result(report.as_json(), *tables)
