"""``wise edit --into``: one file of edits, or the lines that are added to it, into a memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.cli.console import Console
from wisecli.cli.memory import Told
from wisecli.config import LoadOptions
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.run_options import RunOptions
    from wisecli.edits.admission import Admission, Sheet
    from wisecli.memory.history import Provenance


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
        from wisecli.commands.edit_into import Batch, edit_into

        with self.console.watching() as watch:
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
                watch=watch,
            )
        Told(self.console).landed(report)

    def follow(self, edits: Path, interval: float) -> None:
        """Go on with lines that are added to a file, until it is interrupted."""
        if self.admission.signed is not None:
            raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
        from wisecli.commands.watch import follow

        with self.console.watching() as watch:
            for landed in follow(
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
                watch=watch,
            ):
                Told(self.console).landed(landed)
