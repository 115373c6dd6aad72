"""Figures, and what they are taken on: eval, bench, fetch. Parse, call one library function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wisecli.config import BenchSettings, EvalSettings, resolve
from wisecli.console import Console
from wisecli.console_measure import tell_bench, tell_evaluation, tell_study
from wisecli.errors import SettingsError
from wisecli.options import (
    AsJson,
    Budget,
    Config,
    Device,
    Dtype,
    Force,
    Memory,
    Model,
    Output,
    Quiet,
    Seed,
    Trust,
    gates_in,
    setting,
    size_in_bytes,
)


def evaluate(
    directory: Annotated[str | None, typer.Argument(help="Exported directory, or base model.")] = None,
    dataset: Annotated[
        str | None,
        setting(EvalSettings, "dataset", "A benchmark or a file.", none="the memory's own edits"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset's file, instead of fetching it.")] = None,
    edits: Annotated[
        int | None, setting(EvalSettings, "edits", "Only the first so many records.", none="those the memory holds")
    ] = None,
    memory: Memory = None,
    model: Model = None,
    batch_size: Annotated[int | None, setting(EvalSettings, "batch_size", "Rows at a time.")] = None,
    chat: Annotated[bool | None, setting(EvalSettings, "chat", "Ask in the chat template.", "--chat/--no-chat")] = None,
    generate: Annotated[
        bool | None, setting(EvalSettings, "generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        setting(
            EvalSettings, "max_new_tokens", "Length of generated answers.", none="the longest target and a little more"
        ),
    ] = None,
    fail_under: Annotated[
        str | None, typer.Option(help="Exit with 1 below these, as reliability=.9,locality=.95.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    config: Config = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure reliability, generalization, locality, portability and generated answers, before and after."""
    console = Console(as_json, quiet)
    gates = gates_in(fail_under)
    settings = resolve(EvalSettings, locals(), section="eval", file=config)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.evaluate import evaluate as run

    place, base = locate_memory(directory, memory, Path("memory"))
    with console.watching() as watch:
        named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        named["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
        report = run(place, settings, model=model or base, data=data, watch=watch, **named)
    tell_evaluation(console, report)
    report.check(gates)


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, zsre, counterfact or wikibigedit.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to put it.", show_default="the user cache")
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


def bench(
    model: Annotated[str, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")],
    output: Output = Path("bench"),
    dataset: Annotated[
        str | None,
        setting(
            BenchSettings, "dataset", "Benchmarks or files, with commas between: one memory for all.", none="--data"
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A dataset's file, instead of fetching it; once for each.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Records to learn from.", show_default="those that are not edited")
    ] = None,
    methods: Annotated[str | None, setting(BenchSettings, "methods", "Methods, with commas between.")] = None,
    study: Annotated[
        str | None,
        setting(
            BenchSettings,
            "study",
            "Studies in the place of methods, with commas between: router, layers, shards, merge, scaling, latency.",
            none="none",
        ),
    ] = None,
    edits: Annotated[str | None, setting(BenchSettings, "counts", "Numbers of edits, with commas between.")] = None,
    layers: Annotated[int | None, setting(BenchSettings, "layers", "How many layers --study layers looks at.")] = None,
    mask_ratios: Annotated[
        str | None, setting(BenchSettings, "mask_ratios", "Mask ratios of --study shards, with commas between.")
    ] = None,
    shard_counts: Annotated[
        str | None, setting(BenchSettings, "shard_counts", "Numbers of shards of --study shards.")
    ] = None,
    edits_per_shard: Annotated[
        int | None,
        setting(
            BenchSettings,
            "edits_per_shard",
            "For the studies merge, scaling and latency.",
            none="100, or a quarter of the edits",
        ),
    ] = None,
    generate: Annotated[
        bool | None, setting(BenchSettings, "generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    batch_size: Annotated[int | None, setting(BenchSettings, "batch_size", "Rows at a time.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    config: Config = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare editing methods, or study WISE itself: edit with the first records of a dataset, and measure."""
    if study and methods:
        raise SettingsError("--study takes the place of --methods; give one of them, and the other in a second run")
    console = Console(as_json, quiet)
    settings = resolve(BenchSettings, {**locals(), "counts": edits}, section="bench", file=config)
    from wisecli.bench.compare import bench as run_bench
    from wisecli.bench.study import study as run_study

    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with console.watching() as watch:
        named |= {"data": data or (), "force": force, "watch": watch}
        if settings.study and not methods:
            tell_study(console, run_study(model, output, settings, **named))
        else:
            tell_bench(console, run_bench(model, output, settings, train=train, **named))
