"""How drafted pairs are shown, asked about one by one on a terminal, and reported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from wisecli.console import Console, plain

if TYPE_CHECKING:
    from wisecli.commands.draft import DraftReport
    from wisecli.drafting.questions import Pair

_CHOICES = "[y]es, [n]o, [e]dit, [q]uit"


def at_terminal() -> bool:
    """Whether somebody is there who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def approved(pairs: Sequence[Pair]) -> list[Pair]:
    """Ask about each pair; those that are accepted, as they were or as they are then worded.

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
    """The pair as it is typed in; a subject that the new question no longer names is dropped."""
    question = str(typer.prompt("question", default=pair.question, err=True)).strip()
    answer = str(typer.prompt("answer", default=pair.answer, err=True)).strip()
    kept = pair.subject if pair.subject and pair.subject in question else None
    return replace(pair, question=question, answer=answer, subject=kept)


def tell_draft(console: Console, report: DraftReport, kept: Sequence[Pair], output: Path, model: str) -> None:
    """Print what was drafted, and how to go on from there."""
    results = {"page": str(report.page), "passages": report.passages, "drafted": len(report.pairs)}
    results |= {"kept": len(kept), "seconds": report.seconds, "output": str(output)}
    results["pairs"] = [asdict(pair) for pair in kept]
    table = Table()
    for column in ("line", "question", "answer", "subject"):
        table.add_column(column, justify="right" if column == "line" else "left")
    for pair in kept:
        table.add_row(str(pair.line), *map(plain, (pair.question, pair.answer, pair.subject or "")))
    found = f"{len(report.pairs)} questions drawn from {report.passages} passages of {report.page}"
    counted = f"{found}, {len(kept)} kept → {output} ({report.seconds:.1f} s)"
    further = f"look through {output}, then `wise edit {model} {output}`" if kept else "nothing was written"
    console.result({"results": results}, *([table] if kept else []), Text(counted), Text(further))
