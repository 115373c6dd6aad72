"""Checkpoints exported and asked. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wisecli.cli import options as shared
from wisecli.cli.choices import DTYPES, one_of
from wisecli.cli.console import Console, Table, would_write
from wisecli.cli.ineffective_flags import of_export
from wisecli.cli.parameters import ANSWERS, BARE, HUB, OUTPUT, WEIGHTS, flag, option
from wisecli.commands.outputs import checkpoint_output
from wisecli.edits.text import edits_with

if TYPE_CHECKING:
    from wisecli.commands.checkpoint.export import ExportReport
    from wisecli.commands.checkpoint.generate import Answer


def export(
    base: Annotated[
        str | None, typer.Argument(help="Base model: a directory or a hub id; where the memory says, if not given.")
    ] = None,
    memory: Annotated[
        Path, option("Memory directory, or a delta to apply.", "--memory", "--delta", default="memory", metavar="DIR")
    ] = Path("memory"),
    output: shared.Output = Path("edited"),
    form: Annotated[
        Literal["routed", "stock", "gguf", "merged", "delta"],
        option(
            "routed (keeps the router), stock (a router in four more decoder blocks, no custom code), gguf (that for "
            "llama.cpp), merged (always on, stock architecture) or delta (the memory alone).",
            "--format",
            default="routed",
            metavar="NAME",
        ),
    ] = "routed",
    device: shared.Device = "auto",
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
    model: shared.Model = None,
    link: Annotated[
        Literal["always", "auto"] | None,
        option(
            "Hard-link the base's weights instead of copying; auto copies what cannot be linked.",
            "--link",
            panel=WEIGHTS,
            metavar=BARE + "auto]",
        ),
    ] = None,
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
    quantize: Annotated[
        Literal["q8_0", "f16", "f32"],
        option("How --format gguf stores weights.", panel=WEIGHTS, default="q8_0", metavar="NAME"),
    ] = "q8_0",
    verify: Annotated[
        bool,
        flag(
            "Ask a stock or gguf export all its edits and unrelated texts once it is written.",
            "--verify/--no-verify",
            panel=WEIGHTS,
            default="verify",
        ),
    ] = True,
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
    verify_signature: shared.SealSignature = None,
    signer: shared.Signer = None,
    signer_identity: shared.Identity = None,
    sign: Annotated[
        Path | None,
        option(
            "Sign the digests of all files with this key of minisign or ssh-keygen.",
            "--sign",
            panel=OUTPUT,
            metavar="KEY",
        ),
    ] = None,
    force: shared.Force = False,
    quiet: shared.Quiet = False,
) -> None:
    """Write an edited checkpoint that loads with transformers alone."""
    ineffective, console = of_export(locals()), Console(as_json, quiet)
    size = shared.size_in_bytes(max_shard_size, "--max-shard-size")
    signed, key = shared.signed_by(verify_signature, signer, signer_identity), shared.key_in(sign)
    console.warn(ineffective)
    checkpoint_output(output, memory, base or model, metrics, force=force).require_unless_kept()
    from wisecli.commands.checkpoint.export import Publication, WeightFiles
    from wisecli.commands.checkpoint.export import export as run

    with console.watching() as on_progress:
        report = run(
            memory,
            output,
            form,
            model=base or model,
            load=shared.load_options(device),
            weights=WeightFiles(link == "always" or (link or False), dtype, size, quantize),
            publication=Publication(card, metrics, push_to_hub, private, key),
            signed=signed,
            verify=verify,
            force=force,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    tell_export(console, report)


def generate(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts to answer.")],
    memory: shared.Memory = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    max_new_tokens: Annotated[
        int, option("Length of an answer at most.", panel=ANSWERS, default="64", metavar="N", minimum=1)
    ] = 64,
    explain: Annotated[bool, flag("Say which memory answered each token.", "--explain", panel=ANSWERS)] = False,
    chat: Annotated[bool, flag("Ask in the chat template.", "--chat", panel=ANSWERS)] = False,
    batch_size: Annotated[int, option("Prompts at a time.", panel=ANSWERS, default="32", metavar="N", minimum=1)] = 32,
    dtype: shared.Dtype = "auto",
    memory_budget: shared.Budget = None,
    trust_remote_code: shared.Trust = False,
    quiet: shared.Quiet = False,
) -> None:
    """Answer prompts with an edited model."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.directory_kind import locate_memory
    from wisecli.commands.checkpoint.generate import generate as run

    directory, base = locate_memory(model, memory, Path("memory"))
    load = shared.load_options(device, dtype, trust_remote_code, memory_budget)
    with console.watching():
        answers = run(
            directory,
            prompts,
            model=base,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            explain=explain,
            chat=chat,
            load=load,
        )
    tell_answers(console, answers)


def tell_export(console: Console, report: ExportReport) -> None:
    """Print what ``wise export`` wrote."""
    names = "format edits consequences bytes seconds peak_rss_bytes locality tokens pushed gate planned"
    results = {name: getattr(report, name) for name in names.split()}
    results |= {"output": str(report.output), "up_to_date": report.up_to_date}
    held = edits_with(report.edits, report.consequences)
    what = f"{report.format} {'' if report.format == 'delta' else 'checkpoint '}with {held}"
    if report.planned:
        console.result({"results": results}, would_write(what, report))
        return
    done = ": up to date, nothing was written" if report.up_to_date else ""
    lines = [f"{what} → {report.output}/{done} ({report.bytes / 1e6:.0f} MB, {report.seconds:.1f} s)"]
    if report.locality is not None:
        kept = f"{report.locality:.1%} of {report.tokens} next tokens of unrelated text stay the base model's"
        lines.append(f"always on: {kept}; --format routed leaves unrelated text alone")
    if report.gate is not None:
        from wisecli.export.stock.stock_answers import router_lines

        lines += router_lines(report.gate)
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


def _steps(answer: Answer) -> Table:
    """Return the table of an answer's tokens: which memory answered each, and its score."""
    lookup = any(step.edit is not None for step in answer.steps)
    columns = ("token", "answered by", "score", "threshold", *(["nearest edit"] if lookup else []))
    table = Table(columns, right=("score", "threshold"))
    for step in answer.steps:
        who = "main memory" if step.memory is None else f"side memory {step.memory}"
        near = [step.edit or ""] if lookup else []
        table.add(repr(step.token)[1:-1], who, f"{step.score:.3f}", f"{step.threshold:.3f}", *near)
    return table
