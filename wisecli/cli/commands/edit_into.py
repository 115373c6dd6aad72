"""``wise edit --into``: one file of edits, or the lines that are added to it, into a memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.cli.commands.memory import ReportPrinter
from wisecli.cli.console import Console
from wisecli.config import LoadOptions
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit.run_options import RunOptions
    from wisecli.edits.checks.admission import Admission, Sheet
    from wisecli.memory.history.release_log import Provenance


@dataclass(frozen=True)
class IntoMemory:
    """What ``wise edit --into`` does."""

    console: Console
    model: str
    memory: Path
    flags: Mapping[str, Any]
    config: Path | None
    provenance: Provenance
    load: LoadOptions
    options: RunOptions
    admission: Admission

    def once(self, sheet: Sheet) -> None:
        """Edit what a file holds."""
        from wisecli.commands.edit.edit_into import Batch, edit_into

        with self.console.watching() as on_progress:
            report = edit_into(
                self.model,
                Batch.of(sheet),
                self.memory,
                self.flags,
                config=self.config,
                provenance=self.provenance,
                load=self.load,
                options=self.options,
                admission=self.admission,
                on_progress=on_progress,
            )
        ReportPrinter(self.console).landed(report)

    def follow(self, edits: Path, interval: float) -> None:
        """Go on with lines that are added to a file, until it is interrupted."""
        if self.admission.signed is not None:
            raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
        from wisecli.commands.edit.watch import follow

        with self.console.watching() as on_progress:
            for report in follow(
                self.model,
                edits,
                self.memory,
                self.flags,
                interval=interval,
                config=self.config,
                provenance=self.provenance,
                load=self.load,
                options=self.options,
                admission=self.admission,
                on_progress=on_progress,
            ):
                ReportPrinter(self.console).landed(report)
