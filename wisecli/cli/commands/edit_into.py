"""``wise edit --into``: one file of edits, or the lines that are added to it, into a memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wisecli.cli.commands.memory import ReportPrinter
from wisecli.cli.console import Console
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit.edit_into import IntoMemory
    from wisecli.edits.checks.admission import Sheet


def edit_once(console: Console, into: IntoMemory, sheet: Sheet) -> None:
    """Write what a file holds into a memory, and print what that did."""
    from wisecli.commands.edit.edit_into import Batch, edit_into

    with console.watching() as on_progress:
        report = edit_into(into, Batch.of(sheet), on_progress=on_progress)
    ReportPrinter(console).landed(report)


def follow_file(console: Console, into: IntoMemory, edits: Path, interval: float) -> None:
    """Go on with lines that are added to a file, until it is interrupted."""
    if into.admission.signed is not None:
        raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
    from wisecli.commands.edit.watch import follow

    with console.watching() as on_progress:
        for report in follow(into, edits, interval=interval, on_progress=on_progress):
            ReportPrinter(console).landed(report)
