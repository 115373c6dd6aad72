"""``wise edit --into``: one file of edits, or the lines that are added to it, into a memory."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.cli.console import Console
from wisecli.cli.memory import Told
from wisecli.config import LoadOptions
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit import RunOptions
    from wisecli.edits.admission import Admission
    from wisecli.memory.history import Provenance


@dataclass(frozen=True)
class IntoMemory:
    """What ``wise edit --into`` does."""

    console: Console
    model: str
    edits: Path
    memory: Path
    flags: Mapping[str, Any]
    config: Path | None
    provenance: Provenance
    load: LoadOptions
    options: RunOptions
    admission: Admission

    def once(self) -> None:
        """Edit what the file holds."""
        from wisecli.commands.edit_into import Batch, edit_into

        with self.console.watching() as watch:
            with _file(self.edits) as path:
                name = str(self.edits) if self.edits == path else "-"
                batch = Batch.from_file(path, name=name, admission=self.admission)
            report = edit_into(
                self.model,
                batch,
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

    def follow(self, interval: float) -> None:
        """Go on with lines that are added to the file, until it is interrupted."""
        from wisecli.commands.watch import follow

        if self.admission.signed is not None:
            raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
        with self.console.watching() as watch:
            for landed in follow(
                self.model,
                self.edits,
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
