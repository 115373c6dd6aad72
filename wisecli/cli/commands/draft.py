"""Edits drawn from a document. Parse, call one library function, ask the user, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli.console import Console, Table
from wisecli.cli.options import AsJson, Budget, Device, Dtype, Force, Quiet, Trust, load_options
from wisecli.cli.parameters import INPUT, flag, option
from wisecli.config import LoadOptions
from wisecli.edits.text import plain
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit.draft import DraftReport
    from wisecli.drafting.questions import Pair

# Pairs of a passage, unless it is said otherwise.
EACH = 3
Yes = Annotated[bool, flag("Take every pair of the document unasked.", "--yes", panel=INPUT)]
Each = Annotated[
    int, option("Pairs of a passage at most.", "--each", panel=INPUT, default=str(EACH), metavar="N", minimum=1)
]


def draft(
    model: Annotated[str, typer.Argument(help="The model that asks: a directory, a hub id or a GGUF file.")],
    page: Annotated[Path, typer.Argument(help="Document in Markdown or plain text.")],
    output: Annotated[
        Path | None, option("File of edits to write.", "-o", "--output", default="PAGE's name, .jsonl", metavar="FILE")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    each: Each = EACH,
    yes: Yes = False,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Draw questions with answers from a document, to approve of one by one and then to edit with."""
    load = load_options(device, dtype, trust_remote_code, memory_budget)
    draw_edits(Console(as_json, quiet), model, page, output, each=each, load=load, yes=yes, force=force, trains=False)


def draw_edits(
    console: Console,
    model: str,
    page: Path,
    output: Path | None,
    *,
    each: int = EACH,
    load: LoadOptions,
    yes: bool,
    force: bool,
    trains: bool,
) -> Path | None:
    """Ask about drafted pairs and write the accepted ones to a file of edits; return it if it may be trained on.

    Without a terminal all pairs are written, and training waits until a person has read them.

    Args:
        trains: whether the caller goes on with the file, so that only what ends here is reported.

    Raises:
        SettingsError: the file is there already.
        WiseError: the model or the document cannot be used.
    """
    from wisecli.commands.edit.draft import draft as run
    from wisecli.drafting.questions import save_pairs

    file = output or Path(page.with_suffix(".jsonl").name)
    if file.exists() and not force:
        raise SettingsError(f"{file} already exists; edit with it, name another file, or pass --force to draw anew")
    with console.watching() as on_progress:
        report = run(model, page, each=each, load=load, on_progress=on_progress)
    asking = sys.stdin.isatty() and sys.stderr.isatty() and not yes
    kept = approved(report.pairs) if asking else list(report.pairs)
    if kept:
        save_pairs(file, kept)
    goes_on = trains and bool(kept) and (asking or yes)
    if not goes_on:
        tell_draft(console, report, kept, file, model)
    return file if goes_on else None


_CHOICES = "[y]es, [n]o, [e]dit, [q]uit"


def approved(pairs: Sequence[Pair]) -> list[Pair]:
    """Ask about each pair; return the accepted ones, as they were or as reworded.

    Whoever quits leaves out the rest.
    """
    kept: list[Pair] = []
    for number, pair in enumerate(pairs, start=1):
        about = f"{number}/{len(pairs)}, line {pair.line}\n  {plain(pair.question)}\n  {plain(pair.answer)}"
        typer.echo(about, err=True)
        choice = _choice()
        if choice == "q":
            break
        if choice == "e":
            kept.append(_reworded(pair))
        elif choice == "y":
            kept.append(pair)
    return kept


def _choice() -> str:
    while True:
        given = str(typer.prompt(_CHOICES, default="y", err=True)).strip().lower()[:1]
        if given and given in "yneq":
            return given


def _reworded(pair: Pair) -> Pair:
    """Return the pair as it is typed in, without a subject that the new question no longer names."""
    question = str(typer.prompt("question", default=pair.question, err=True)).strip()
    answer = str(typer.prompt("answer", default=pair.answer, err=True)).strip()
    kept = pair.subject if pair.subject and pair.subject in question else None
    return replace(pair, question=question, answer=answer, subject=kept)


def tell_draft(console: Console, report: DraftReport, kept: Sequence[Pair], output: Path, model: str) -> None:
    """Print what was drafted, and how to go on from there."""
    results = {"page": str(report.page), "passages": report.passages, "drafted": len(report.pairs)}
    results |= {"kept": len(kept), "seconds": report.seconds, "output": str(output)}
    results["pairs"] = [asdict(pair) for pair in kept]
    table = Table(("line", "question", "answer", "subject"), right=("line",))
    for pair in kept:
        table.add(str(pair.line), pair.question, pair.answer, pair.subject or "")
    found = f"{len(report.pairs)} questions drawn from {report.passages} passages of {report.page}"
    counted = f"{found}, {len(kept)} kept → {output} ({report.seconds:.1f} s)"
    next_step = f"look through {output}, then `wise edit {model} {output}`" if kept else "nothing was written"
    console.result({"results": results}, *([table] if kept else []), counted, next_step)
