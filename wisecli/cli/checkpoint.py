"""Checkpoints exported, asked and looked into, as memories and shards are. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wisecli.cli.choices import DTYPES, one_of
from wisecli.cli.console import Console, Table, count, would_write
from wisecli.cli.effects import of_export
from wisecli.cli.options import (
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
    load_options,
    size_in_bytes,
)
from wisecli.cli.parameters import ANSWERS, HUB, WEIGHTS, flag, option
from wisecli.commands.outputs import checkpoint_output

if TYPE_CHECKING:
    from wisecli.artifacts.memory_manifest import MemoryEntry
    from wisecli.commands.export import ExportReport
    from wisecli.commands.generate import Answer
    from wisecli.commands.inspect import InspectReport
    from wisecli.commands.verify import VerifyReport


def export(
    base: Annotated[
        str | None, typer.Argument(help="Base model: a directory or a hub id; where the memory says, if not given.")
    ] = None,
    memory: Annotated[
        Path,
        option("Memory directory, or a delta to apply.", "--memory", "--delta", default="memory", metavar="DIR"),
    ] = Path("memory"),
    output: Output = Path("edited"),
    form: Annotated[
        Literal["routed", "merged", "delta"],
        option(
            "routed (keeps the router), merged (always on, stock architecture) or delta (the memory alone).",
            "--format",
            default="routed",
            metavar="NAME",
        ),
    ] = "routed",
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    model: Model = None,
    link: Annotated[bool, flag("Hard-link the base's weights instead of copying.", "--link", panel=WEIGHTS)] = False,
    dtype: Annotated[
        str,
        option(
            "auto (as stored), float32, bfloat16 or float16.",
            "--dtype",
            panel=WEIGHTS,
            default="auto",
            metavar="NAME",
            complete=one_of(DTYPES),
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str | None,
        option(
            "Size of a file of weights at most, such as 2GB.",
            panel=WEIGHTS,
            default="the base's own files",
            metavar="SIZE",
        ),
    ] = None,
    metrics: Annotated[
        Path | None, option("Report of wise eval --json, for the model card.", panel=HUB, metavar="FILE")
    ] = None,
    card: Annotated[
        bool, flag("Write a model card.", "--model-card/--no-model-card", panel=HUB, default="model-card")
    ] = True,
    push_to_hub: Annotated[
        str | None, option("Repository on the hub to send it to.", panel=HUB, metavar="NAME")
    ] = None,
    private: Annotated[bool, flag("Make a new repository private.", "--private", panel=HUB)] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write an edited checkpoint that loads with transformers alone."""
    unread, console = of_export(locals()), Console(as_json, quiet)
    size = size_in_bytes(max_shard_size, "--max-shard-size")
    console.warn(unread)
    checkpoint_output(output, memory, base or model, metrics, force=force).require()
    from wisecli.commands.export import Publication, WeightFiles
    from wisecli.commands.export import export as run

    with console.watching() as watch:
        report = run(
            memory,
            output,
            form,
            model=base or model,
            load=load_options(device),
            weights=WeightFiles(link, dtype, size),
            publication=Publication(card, metrics, push_to_hub, private),
            force=force,
            dry_run=dry_run,
            watch=watch,
        )
    tell_export(console, report)


def generate(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts to answer.")],
    memory: Memory = None,
    device: Device = "auto",
    as_json: AsJson = False,
    max_new_tokens: Annotated[
        int, option("Length of an answer at most.", panel=ANSWERS, default="64", metavar="N", least=1)
    ] = 64,
    explain: Annotated[bool, flag("Say which memory answered each token.", "--explain", panel=ANSWERS)] = False,
    chat: Annotated[bool, flag("Ask in the chat template.", "--chat", panel=ANSWERS)] = False,
    batch_size: Annotated[int, option("Prompts at a time.", panel=ANSWERS, default="32", metavar="N", least=1)] = 32,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with an edited model."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.generate import generate as run

    place, base = locate_memory(model, memory, Path("memory"))
    load = load_options(device, dtype, trust_remote_code, memory_budget)
    with console.watching():
        answers = run(
            place,
            prompts,
            model=base,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            explain=explain,
            chat=chat,
            load=load,
        )
    tell_answers(console, answers)


def inspect(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    find: Annotated[str | None, option("Only edits with this text in them.", "--find")] = None,
    limit: Annotated[int, option("List so many edits at most.", "--limit", default="20", metavar="N", least=0)] = 20,
    plot: Annotated[
        Path | None, option("Draw the router's scores and threshold into this file.", "--plot", metavar="FILE")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a directory holds, from its manifest and headers; no weights are loaded."""
    from wisecli.commands.inspect import inspect as run

    tell_inspection(Console(as_json, quiet), run(path, find=find, limit=limit, plot=plot, force=force))


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


_STATES = {"same": "ok", "differs": "DIFFERS", "unchecked": "not checked"}


def tell_export(console: Console, report: ExportReport) -> None:
    """Print what ``wise export`` wrote."""
    names = ("format", "edits", "bytes", "seconds", "peak_rss_bytes", "locality", "tokens", "pushed", "planned")
    results = {name: getattr(report, name) for name in names} | {"output": str(report.output)}
    what = f"{report.format} {'' if report.format == 'delta' else 'checkpoint '}with {count(report.edits, 'edit')}"
    if report.planned:
        console.result({"results": results}, would_write(what, report))
        return
    lines = [f"{what} → {report.output}/ ({report.bytes / 1e6:.0f} MB, {report.seconds:.1f} s)"]
    if report.locality is not None:
        kept = f"{report.locality:.1%} of {report.tokens} next tokens of unrelated text stay the base model's"
        lines.append(f"always on: {kept}; --format routed leaves unrelated text alone")
    if report.pushed is not None:
        lines.append(f"sent to {report.pushed}")
    console.result({"results": results}, *lines)


def tell_answers(console: Console, answers: Sequence[Answer]) -> None:
    """Print answers, with a table of tokens where they were explained."""
    shown: list[str | Table] = []
    for answer in answers:
        text = answer.text if len(answers) == 1 else f"{answer.prompt} → {answer.text}"
        shown += text.split("\n")
        if answer.steps:
            shown.append(_steps(answer))
    content = [{"prompt": a.prompt, "answer": a.text, "steps": [vars(step) for step in a.steps]} for a in answers]
    console.result({"results": content}, *shown)


def tell_inspection(console: Console, report: InspectReport) -> None:
    """Print what ``wise inspect`` found."""
    facts = Table(("", ""), f"{report.path}: {report.kind}", headed=False)
    for name, value in _facts(report):
        facts.add(name, value)
    edits = Table(("id", "prompt", "target", "subject"), f"{len(report.edits)} of {count(report.matched, 'edit')}")
    for edit in report.edits:
        edits.add(edit.id, edit.prompt, edit.target, edit.subject or "")
    scores = [_scores(number, entry) for number, entry in enumerate(report.memories)]
    console.result(report.as_json(), facts, *scores, *([edits] if report.edits else []))


def tell_verification(console: Console, report: VerifyReport) -> None:
    """Print what ``wise verify`` found, a line a check."""
    lines = []
    for check in report.checks:
        what = f"{check.file}: {check.what}" + (f" {check.tensor}" if check.tensor else "")
        sides = f": expected {check.expected}, found {check.found}" if check.state == "differs" else ""
        why = f": {check.found}" if check.state == "unchecked" else ""
        lines.append(f"{_STATES[check.state]:<11} {what}{sides}{why}")
    console.result(report.as_json(), *lines)


def _steps(answer: Answer) -> Table:
    lookup = any(step.edit is not None for step in answer.steps)
    columns = ("token", "answered by", "score", "threshold", *(["nearest edit"] if lookup else []))
    table = Table(columns, right=("score", "threshold"))
    for step in answer.steps:
        who = "main memory" if step.memory is None else f"side memory {step.memory}"
        near = [step.edit or ""] if lookup else []
        table.add(repr(step.token)[1:-1], who, f"{step.score:.3f}", f"{step.threshold:.3f}", *near)
    return table


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    base, site, files = report.base, report.site, report.files
    yield "base model", str(base["model"]) + (f" at {base['revision']}" if base["revision"] else "")
    yield "fingerprint", f"matrix {base['matrix'][:16]}…, settings {base['config'][:16]}…"
    yield "site", f"{site['module']} ({site['architecture']}, layer {site['layer']}, {site['d']}×{site['d_ff']})"
    yield "edits", f"{report.total}, with {count(report.keys, 'key')}"
    if report.routing:
        yield "memory", ", ".join(f"{name} {value}" for name, value in report.routing.items())
    for shard in report.shards:
        loss = f", loss {shard.losses[-1]:.4g}" if shard.losses else ""
        yield "shard", f"{shard.file}: {count(len(shard.edits), 'edit')}, mask of {shard.mask_kind}{loss}"
    for file, tensors in report.tensors.items():
        yield file, ", ".join(f"{name.rpartition('.')[2]} {what}" for name, what in tensors.items())
    yield "files", ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in files.items())
    yield "settings", ", ".join(f"{name} {value}" for name, value in report.settings.items())
    yield "written with", ", ".join(f"{name} {version}" for name, version in report.versions.items())
    if report.plot is not None:
        yield "plot", str(report.plot)


def _scores(number: int, entry: MemoryEntry) -> Table:
    """The quantiles of one memory's scores on both sides of its threshold."""
    about = f"{entry.misses:.1%} of the edits' tokens below, {entry.false_alarms:.2%} of unrelated ones above"
    columns = "scores below", "edits", "unrelated text"
    table = Table(columns, f"memory {number}: threshold {entry.threshold:.4g} ({entry.rule}); {about}", columns)
    for share in dict.fromkeys([*entry.edit_scores, *entry.unrelated_scores]):
        sides = entry.edit_scores, entry.unrelated_scores
        table.add(f"{float(share):.1%}", *(f"{scores[share]:.3f}" if share in scores else "" for scores in sides))
    return table
