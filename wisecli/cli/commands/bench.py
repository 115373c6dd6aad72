"""``wise bench``: options, one call, what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import options as shared
from wisecli.cli.choices import BENCH_METHODS, DATASETS, FILED_DATASETS, STUDIES, some_of
from wisecli.cli.console import Console, Table
from wisecli.cli.parameters import INPUT, MEASURED, STUDIED, option, setting
from wisecli.cli.setting_options import set_of, settings_in
from wisecli.cli.unknown_settings import unknown_names
from wisecli.config import BenchSettings, resolve
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.bench.compare import BenchReport
    from wisecli.bench.study import StudyReport

# A method with what was measured of it, and how wide the names of figures and a method's column are at the most.
_MethodCells = tuple[str, list[str]]
_KINDS_WIDTH, _METHOD_WIDTH = 32, 13

_studied = partial(setting, BenchSettings, panel=STUDIED)
_measured = partial(setting, BenchSettings, panel=MEASURED)


def bench(
    model: Annotated[str, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")],
    output: shared.Output = Path("bench"),
    dataset: Annotated[
        str | None,
        setting(
            BenchSettings,
            "dataset",
            "Benchmarks or files, with commas between: one memory for all.",
            none="--data",
            complete=some_of((*DATASETS, *FILED_DATASETS)),
        ),
    ] = None,
    methods: Annotated[
        str | None, setting(BenchSettings, "methods", "Methods, with commas between.", complete=some_of(BENCH_METHODS))
    ] = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    data: Annotated[
        list[Path] | None,
        option("A dataset's file, instead of fetching it; once for each.", panel=INPUT, metavar="FILE"),
    ] = None,
    train: Annotated[
        Path | None, option("Records to learn from.", panel=INPUT, default="those that are not edited", metavar="FILE")
    ] = None,
    edits: Annotated[
        str | None,
        setting(BenchSettings, "counts", "Numbers of edits, with commas between.", panel=INPUT, metavar="N,…"),
    ] = None,
    config: shared.Config = None,
    seed: shared.Seed = None,
    study: Annotated[
        str | None,
        _studied(
            "study",
            "Studies in the place of methods, with commas between: router, layers, shards, merge, scaling, latency.",
            none="none",
            complete=some_of(STUDIES),
        ),
    ] = None,
    protocol: Annotated[str | None, shared.protocol_of(BenchSettings)] = None,
    forms: Annotated[str | None, shared.forms_of(BenchSettings)] = None,
    kinds: Annotated[str | None, shared.kinds_of(BenchSettings)] = None,
    ask: Annotated[int | None, shared.ask_of(BenchSettings)] = None,
    generate: Annotated[
        bool | None, _measured("generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    set_: Annotated[list[str] | None, set_of("bench", MEASURED)] = None,
    dtype: shared.Dtype = "auto",
    trust_remote_code: shared.Trust = False,
    force: shared.Force = False,
    quiet: shared.Quiet = False,
) -> None:
    """Compare editing methods, or study WISE itself: edit with the first records of a dataset, and measure."""
    if study and methods:
        raise SettingsError("--study takes the place of --methods; give one of them, and the other in a second run")
    console = Console(as_json, quiet)
    settings = resolve(
        BenchSettings, {**locals(), "counts": edits, **settings_in("bench", set_)}, section="bench", file=config
    )
    console.warn(unknown_names(config))
    from wisecli.bench.compare import bench as run_bench
    from wisecli.bench.study import study as run_study

    load = shared.load_options(device, dtype, trust_remote_code)
    with console.watching() as on_progress:
        if settings.study and not methods:
            study_report = run_study(
                model, output, settings, data=data or (), load=load, force=force, on_progress=on_progress
            )
            tell_study(console, study_report)
        else:
            bench_report = run_bench(
                model, output, settings, data=data or (), train=train, load=load, force=force, on_progress=on_progress
            )
            tell_bench(console, bench_report)


def tell_bench(console: Console, report: BenchReport) -> None:
    """Print what ``wise bench`` measured: a line a figure and a column a method, tables for each number of edits."""
    from wisecli.bench.reporting.html_tables import columns, costs, heads, note

    shown, tables, cannot = columns(report.rows), [], []
    kinds = heads(report.rows)[2:]
    for count in dict.fromkeys(row["edits"] for row in report.rows):
        cells_by_method: dict[str, list[str]] = {}
        for name, figures in ((row["method"], row["figures"]) for row in report.rows if row["edits"] == count):
            if "cannot" in figures:
                cannot.append(f"{name}, {count} edits: cannot run: {figures['cannot']}")
                continue
            cells = [f"{figures[figure]:.3f}" if figure in figures else "" for figure in shown]
            cells_by_method[name] = [*cells, *costs(figures)]
        tables += [
            _table(part, kinds, f"{report.dataset}, {count} edits") for part in _parts([*cells_by_method.items()])
        ]
    console.result(report.as_json(), *tables, *cannot, note(report.rows))


def _parts(methods: Sequence[_MethodCells]) -> list[Sequence[_MethodCells]]:
    """Return as many methods at a time as stand beside each other in a terminal of this width."""
    per_table = max(1, (get_terminal_size().columns - _KINDS_WIDTH) // _METHOD_WIDTH)
    return [methods[start : start + per_table] for start in range(0, len(methods), per_table)]


def _table(methods: Sequence[_MethodCells], kinds: Sequence[str], title: str) -> Table:
    names = tuple(name for name, _ in methods)
    table = Table(("", *names), title, names, folded=True)
    for kind, *cells in zip(kinds, *(cells for _, cells in methods), strict=True):
        table.add(kind, *cells)
    return table


def tell_study(console: Console, report: StudyReport) -> None:
    """Print the studies of ``wise bench``, a table each."""
    tables = []
    for section in report.sections():
        table = Table(section.heads, section.title, section.heads, folded=True)
        for row in section.cells:
            table.add(*row)
        tables.append(table)
    console.result(report.as_json(), *tables)
