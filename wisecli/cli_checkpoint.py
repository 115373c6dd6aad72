"""Checkpoints exported, asked and looked into, as memories and shards are. Parse, call one library function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wisecli.console import Console
from wisecli.console_checkpoint import tell_answers, tell_export, tell_inspection, tell_verification
from wisecli.options import (
    AsJson,
    Budget,
    Device,
    DryRun,
    Dtype,
    Force,
    Memory,
    Model,
    Output,
    Quiet,
    Trust,
    size_in_bytes,
)


def export(
    base: Annotated[
        str | None, typer.Argument(help="Base model: a directory or a hub id; where the memory says, if not given.")
    ] = None,
    memory: Annotated[Path, typer.Option("--memory", "--delta", help="Memory directory, or a delta to apply.")] = Path(
        "memory"
    ),
    output: Output = Path("edited"),
    form: Annotated[
        Literal["routed", "merged", "delta"],
        typer.Option(
            "--format",
            help="routed (keeps the router), merged (always on, stock architecture) or delta (the memory alone).",
        ),
    ] = "routed",
    link: Annotated[bool, typer.Option("--link", help="Hard-link the base's weights instead of copying.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Size of a file of weights at most, such as 2GB.", show_default="the base's own files"),
    ] = None,
    metrics: Annotated[Path | None, typer.Option(help="Report of wise eval --json, for the model card.")] = None,
    card: Annotated[bool, typer.Option("--model-card/--no-model-card", help="Write a model card.")] = True,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository on the hub to send it to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    model: Model = None,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an edited checkpoint that loads with transformers alone."""
    console = Console(as_json, quiet)
    from wisecli.commands.export import export as run

    with console.watching() as watch:
        named: dict[str, Any] = {"device": device, "force": force, "dry_run": dry_run, "watch": watch}
        weights: dict[str, Any] = {"link": link, "dtype": dtype}
        weights["file_bytes"] = size_in_bytes(max_shard_size, "--max-shard-size")
        hub: dict[str, Any] = {"push_to": push_to_hub, "private": private, "metrics": metrics, "card": card}
        report = run(memory, output, form, model=base or model, **weights, **hub, **named)
    tell_export(console, report)


def generate(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts to answer.")],
    memory: Memory = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 32,
    explain: Annotated[bool, typer.Option("--explain", help="Say which memory answered each token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with an edited model."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.generate import generate as run

    place, base = locate_memory(model, memory, Path("memory"))
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    named["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
    with console.watching():
        answers = run(place, prompts, model=base, explain=explain, chat=chat, **lengths, **named)
    tell_answers(console, answers)


def inspect(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    find: Annotated[str | None, typer.Option("--find", help="Only edits with this text in them.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="List so many edits at most.")] = 20,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the router's scores and threshold into this file.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Say what a directory holds, from its manifest and headers; no weights are loaded."""
    from wisecli.commands.inspect import inspect as run

    tell_inspection(Console(as_json), run(path, find=find, limit=limit, plot=plot, force=force))


def verify(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every file of a directory against its manifest, and the base model; exit with 1 if any differs."""
    console = Console(as_json, quiet)
    from wisecli.commands.verify import verify as run

    with console.watching() as watch:
        report = run(path, model=model, watch=watch)
    tell_verification(console, report)
    report.check()
