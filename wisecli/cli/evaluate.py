"""Figures, and what they are taken on: eval, bench, fetch. Parse, call one library function, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli.choices import DATASETS, MODELS, one_of
from wisecli.cli.console import Console, Table, count, note
from wisecli.cli.effects import of_evaluation
from wisecli.cli.options import (
    AsJson,
    Budget,
    Config,
    Device,
    Dtype,
    Force,
    Memory,
    Model,
    Quiet,
    Trust,
    load_options,
    thresholds_in,
)
from wisecli.cli.overlooked import overlooked
from wisecli.cli.parameters import INPUT, MEASURED, flag, option, setting
from wisecli.config import EvalSettings, resolve

if TYPE_CHECKING:
    from wisecli.commands.evaluate import EvalReport


_measured = partial(setting, EvalSettings, panel=MEASURED)


def evaluate(
    directory: Annotated[str | None, typer.Argument(help="Exported directory, or base model.")] = None,
    memory: Memory = None,
    dataset: Annotated[
        str | None,
        setting(
            EvalSettings,
            "dataset",
            "A benchmark (zsre, counterfact, wikibigedit) or a file.",
            none="the memory's own edits",
            complete=one_of(DATASETS),
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    model: Model = None,
    data: Annotated[
        Path | None, option("The dataset's file, instead of fetching it.", panel=INPUT, metavar="FILE")
    ] = None,
    edits: Annotated[
        int | None,
        setting(
            EvalSettings,
            "edits",
            "Only the first so many records.",
            panel=INPUT,
            none="those the memory holds",
        ),
    ] = None,
    config: Config = None,
    chat: Annotated[bool | None, _measured("chat", "Ask in the chat template.", "--chat/--no-chat")] = None,
    generate: Annotated[
        bool | None, _measured("generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        _measured("max_new_tokens", "Length of generated answers.", none="the longest target and a little more"),
    ] = None,
    batch_size: Annotated[int | None, _measured("batch_size", "Rows at a time.")] = None,
    fail_under: Annotated[
        str | None,
        option("Exit with 1 below these, as reliability=.9,locality=.95.", panel=MEASURED),
    ] = None,
    if_measured: Annotated[
        bool,
        flag("Of --fail-under pass over what no record measures.", "--if-measured", panel=MEASURED),
    ] = False,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Measure reliability, generalization, locality, portability and generated answers, before and after."""
    unread, console = of_evaluation(locals()), Console(as_json, quiet)
    gates = thresholds_in(fail_under)
    settings = resolve(EvalSettings, locals(), section="eval", file=config)
    console.warn([*unread, *overlooked(config)])
    load = load_options(device, dtype, trust_remote_code, memory_budget)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.evaluate import evaluate as run

    place, base = locate_memory(directory, memory, Path("memory"))
    with console.watching() as watch:
        report = run(place, settings, model=model or base, data=data, load=load, watch=watch)
    tell_evaluation(console, report)
    passed_over = report.check(gates, if_measured=if_measured)
    if passed_over:
        note(f"no record measures {', '.join(passed_over)}, so --fail-under passed over it")


def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, zsre, counterfact or wikibigedit.", autocompletion=one_of((*MODELS, *DATASETS))
        ),
    ],
    output: Annotated[
        Path | None, option("Where to put it.", "-o", "--output", default="the user cache", metavar="PATH")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fetch the small model to try things on, or benchmark data."""
    console = Console(as_json, quiet)
    from wisecli.commands.fetch import fetch as run

    with console.watching() as watch:
        place = run(name, output, force=force, watch=watch)
    console.result({"results": {"output": str(place)}}, str(place))


def tell_evaluation(console: Console, report: EvalReport) -> None:
    """Print what ``wise eval`` measured."""
    right = "before", "after"
    table = Table(("measure", *right), f"{report.dataset}: {count(report.samples['edits'], 'edit')}", right)
    for name, after in report.after.items():
        table.add(name, f"{report.before[name]:.3f}", f"{after:.3f}")
    console.result(report.as_json(), table)
