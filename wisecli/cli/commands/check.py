"""``wise check``: its options, and one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli.console import Console, Table
from wisecli.cli.options import AsJson, Quiet
from wisecli.cli.parameters import ANSWERS, INPUT, WHERE, flag, option

if TYPE_CHECKING:
    from wisecli.commands.measure.check import CheckReport


def check(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server, as http://localhost:8000.")],
    edits: Annotated[
        Path, option("The edits that the served model should hold: a file, or the exported directory.", metavar="PATH")
    ],
    model: Annotated[
        str | None, option("The server's name for the model.", panel=WHERE, default="its first", metavar="NAME")
    ] = None,
    base: Annotated[
        str | None,
        option(
            "A server of the unedited model; unrelated answers must be word for word its own.",
            panel=WHERE,
            metavar="URL",
        ),
    ] = None,
    unrelated: Annotated[
        Path | None,
        option("Unrelated prompts, one a line.", panel=INPUT, default="20 of the package's", metavar="FILE"),
    ] = None,
    contained: Annotated[
        bool, flag("An answer holds if the target is in it, not only if it is all of it.", "--contained", panel=ANSWERS)
    ] = False,
    key: Annotated[
        str,
        option(
            "The environment variable with the server's key.",
            "--api-key-env",
            panel=WHERE,
            default="OPENAI_API_KEY",
            metavar="NAME",
        ),
    ] = "OPENAI_API_KEY",
    timeout: Annotated[
        float,
        option("Seconds to wait for an answer.", "--timeout", panel=WHERE, default="60", metavar="S", minimum=0.1),
    ] = 60.0,
    jobs: Annotated[int, option("Requests at a time.", "--jobs", panel=WHERE, default="8", metavar="N", minimum=1)] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask a server of the edited model its edits and unrelated prompts; exit with 1 if any answer does not hold."""
    console = Console(as_json, quiet)
    from wisecli.commands.measure.check import check as run
    from wisecli.commands.measure.openai_server import Server

    secret = os.environ.get(key)
    server = Server(url, model, secret, timeout)
    other = None if base is None else Server(base, None, secret, timeout)
    with console.watching() as on_progress:
        report = run(
            server, edits, base=other, unrelated=unrelated, contained=contained, jobs=jobs, on_progress=on_progress
        )
    console.warn(
        [
            f"{report.url} cannot be asked by {name}, which was left out: it {said}"
            for name, said in report.missing.items()
        ]
    )
    tell_check(console, report)
    report.check()


def tell_check(console: Console, report: CheckReport) -> None:
    """Print what ``wise check`` found."""
    table = Table(("asked", "prompts", "hold"), f"{report.model} at {report.url}", ("prompts", "hold"))
    for name, total, held in report.counts():
        table.add(name, str(total), str(held))
    console.result(report.as_json(), table)
