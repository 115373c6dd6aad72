"""``wise bench``: options, one call, what is printed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.bench.html import columns, costs, heads, note
from wisecli.cli.choices import BENCH_METHODS, DATASETS, FILED_DATASETS, STUDIES, some_of
from wisecli.cli.console import Console, Table
from wisecli.cli.options import (
    AsJson,
    Config,
    Device,
    Dtype,
    Force,
    Output,
    Quiet,
    Seed,
    Trust,
    ask_of,
    forms_of,
    load_options,
    protocol_of,
)
from wisecli.cli.overlooked import overlooked
from wisecli.cli.parameters import INPUT, MEASURED, STUDIED, option, setting
from wisecli.config import BenchSettings, resolve
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.bench.compare import BenchReport
    from wisecli.bench.study import StudyReport


_studied = partial(setting, BenchSettings, panel=STUDIED)
_measured = partial(setting, BenchSettings, panel=MEASURED)


def bench(
    model: Annotated[str, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")],
    output: Output = Path("bench"),
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
        str | None,
        setting(BenchSettings, "methods", "Methods, with commas between.", complete=some_of(BENCH_METHODS)),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    data: Annotated[
        list[Path] | None,
        option("A dataset's file, instead of fetching it; once for each.", panel=INPUT, metavar="FILE"),
    ] = None,
    train: Annotated[
        Path | None,
        option("Records to learn from.", panel=INPUT, default="those that are not edited", metavar="FILE"),
    ] = None,
    edits: Annotated[
        str | None,
        setting(BenchSettings, "counts", "Numbers of edits, with commas between.", panel=INPUT, metavar="N,…"),
    ] = None,
    config: Config = None,
    seed: Seed = None,
    study: Annotated[
        str | None,
        _studied(
            "study",
            "Studies in the place of methods, with commas between: router, layers, shards, merge, scaling, latency.",
            none="none",
            complete=some_of(STUDIES),
        ),
    ] = None,
    layers: Annotated[int | None, _studied("layers", "How many layers --study layers looks at.")] = None,
    mask_ratios: Annotated[
        str | None, _studied("mask_ratios", "Mask ratios of --study shards, with commas between.", metavar="X,…")
    ] = None,
    shard_counts: Annotated[
        str | None, _studied("shard_counts", "Numbers of shards of --study shards.", metavar="N,…")
    ] = None,
    edits_per_shard: Annotated[
        int | None,
        _studied(
            "edits_per_shard", "For the studies merge, scaling and latency.", none="100, or a quarter of the edits"
        ),
    ] = None,
    protocol: Annotated[str | None, protocol_of(BenchSettings)] = None,
    forms: Annotated[str | None, forms_of(BenchSettings)] = None,
    ask: Annotated[int | None, ask_of(BenchSettings)] = None,
    generate: Annotated[
        bool | None, _measured("generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    batch_size: Annotated[int | None, _measured("batch_size", "Rows at a time.")] = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Compare editing methods, or study WISE itself: edit with the first records of a dataset, and measure."""
    if study and methods:
        raise SettingsError("--study takes the place of --methods; give one of them, and the other in a second run")
    console = Console(as_json, quiet)
    settings = resolve(BenchSettings, {**locals(), "counts": edits}, section="bench", file=config)
    console.warn(overlooked(config))
    from wisecli.bench.compare import bench as run_bench
    from wisecli.bench.study import study as run_study

    load = load_options(device, dtype, trust_remote_code)
    with console.watching() as watch:
        if settings.study and not methods:
            study_report = run_study(model, output, settings, data=data or (), load=load, force=force, watch=watch)
            tell_study(console, study_report)
        else:
            bench_report = run_bench(
                model, output, settings, data=data or (), train=train, load=load, force=force, watch=watch
            )
            tell_bench(console, bench_report)


def tell_bench(console: Console, report: BenchReport) -> None:
    """Print what ``wise bench`` measured: a table for each number of edits, a line a figure and a column a method."""
    shown, tables, cannot = columns(report.rows), [], []
    kinds = heads(report.rows)[2:]
    for count in dict.fromkeys(row["edits"] for row in report.rows):
        told: dict[str, list[str]] = {}
        for name, figures in ((row["method"], row["figures"]) for row in report.rows if row["edits"] == count):
            if "cannot" in figures:
                cannot.append(f"{name}, {count} edits: cannot run: {figures['cannot']}")
                continue
            cells = [f"{figures[figure]:.3f}" if figure in figures else "" for figure in shown]
            told[name] = [*cells, *costs(figures)]
        table = Table(("", *told), f"{report.dataset}, {count} edits", tuple(told), folded=True)
        for kind, *cells in zip(kinds, *told.values(), strict=True) if told else ():
            table.add(kind, *cells)
        tables += [table] if told else []
    console.result(report.as_json(), *tables, *cannot, note(report.rows))


def tell_study(console: Console, report: StudyReport) -> None:
    """Print the studies of ``wise bench``, a table each."""
    tables = []
    for section in report.sections():
        table = Table(section.heads, section.title, section.heads, folded=True)
        for row in section.cells:
            table.add(*row)
        tables.append(table)
    console.result(report.as_json(), *tables)
