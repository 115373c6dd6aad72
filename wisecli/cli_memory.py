"""Commands on a memory that is edited again and again. Parse, call one library function, print."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.config import MergeSettings
from wisecli.console import Console
from wisecli.console_memory import Told
from wisecli.errors import SettingsError
from wisecli.options import AsJson, Budget, Device, Dtype, Memory, Model, Quiet, Reason, Trust, Who, size_in_bytes

if TYPE_CHECKING:
    from wisecli.edits.admission import Gate

Place = Annotated[Path, typer.Argument(help="A memory with a history, as `wise edit --into` makes it.")]


def remove(
    memory: Place,
    ids: Annotated[list[str], typer.Argument(help="Ids of the edits to take out.")],
    model: Model = None,
    reason: Reason = "",
    who: Who = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take edits out of a memory, as if they had never been in it."""
    console = Console(as_json, quiet)
    from wisecli.commands.remove import remove as run

    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with console.watching() as watch:
        report = run(memory, ids, model=model, reason=reason, who=who, watch=watch, **named)
    Told(console).removed(report)


def rollback(
    memory: Place,
    to: Annotated[str, typer.Option("--to", help="Number of a release, or a date or time, as 2026-11-01.")],
    model: Model = None,
    reason: Reason = "",
    who: Who = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a memory what it was at an earlier release; the releases since stay in its history."""
    console = Console(as_json, quiet)
    from wisecli.commands.rollback import rollback as run

    with console.watching() as watch:
        report = run(memory, to, model=model, reason=reason, who=who, watch=watch)
    Told(console).rolled_back(report)


def log(
    memory: Place,
    edit: Annotated[str | None, typer.Option("--edit", help="Only what touched the edit with this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what was done to a memory, when and by whom, after checking that its log is whole."""
    from wisecli.commands.log import log as run

    Told(Console(as_json)).logged(run(memory, edit=edit), of_one=edit is not None)


def diff(
    first: Annotated[str, typer.Argument(help="Memory, checkpoint or shards; memory@3 for a release.")],
    second: Annotated[str, typer.Argument(help="What to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """Say which edits and settings two memories, exported checkpoints or releases do not share."""
    from wisecli.commands.diff import diff as run

    Told(Console(as_json)).compared(run(first, second))


def explain(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompt: Annotated[str, typer.Argument(help="The prompt to look at.")],
    memory: Memory = None,
    nearest: Annotated[int, typer.Option(min=0, help="How many memories, or edits, are made to answer.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the scores of all tokens into this file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say why a prompt is answered as it is: nearest edits, scores by token, and what each memory would answer."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.explain import explain as run

    place, base = locate_memory(model, memory, Path("memory"))
    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "chat": chat}
    named["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
    with console.watching():
        report = run(place, prompt, model=base, nearest=nearest, max_new_tokens=max_new_tokens, plot=plot, **named)
    Told(console).explained(report)


def edit_into(
    console: Console,
    model: str,
    edits: Path,
    memory: Path,
    flags: Mapping[str, Any],
    *,
    follow: bool,
    interval: float,
    **named: Any,
) -> None:
    """What ``wise edit --into`` does, and with ``follow`` goes on doing until it is interrupted."""
    from wisecli.commands.edit_into import Batch
    from wisecli.commands.edit_into import edit_into as run_edit_into
    from wisecli.commands.watch import follow as run_follow

    told = Told(console)
    gate: Gate = named["gate"]
    if follow and gate.signed is not None:
        raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
    with console.watching() as watch:
        if follow:
            for landed in run_follow(model, edits, memory, flags, interval=interval, watch=watch, **named):
                told.landed(landed)
            return
        reason = named.pop("reason")
        with _file(edits) as path:
            name = str(edits) if edits == path else "-"
            batch = Batch.from_file(path, name=name, reason=reason, gate=gate)
        report = run_edit_into(model, batch, memory, flags, watch=watch, **named)
    told.landed(report)


def merge_into(console: Console, shards: list[Path], memory: Path, settings: MergeSettings, **named: Any) -> None:
    """What ``wise merge --into`` does."""
    from wisecli.commands.edit_into import merge_into as run

    with console.watching() as watch:
        published = run(shards, memory, settings, watch=watch, **named)
    Told(console).joined(str(memory), published)


@contextmanager
def _file(edits: Path) -> Iterator[Path]:
    """The file of edits, or what comes through the pipe as one."""
    if str(edits) != "-":
        yield edits
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "stdin"
        with path.open("wb") as stream:
            shutil.copyfileobj(sys.stdin.buffer, stream)
        yield path
