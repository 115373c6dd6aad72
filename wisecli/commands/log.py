"""``wise log``: what was done to a memory, when and by whom; or the life of one edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.edits.record import Edit
from wisecli.memory.history import Release, read_history, require_newest
from wisecli.memory.releases import directories_of


@dataclass(frozen=True)
class LogReport:
    """Releases, the oldest first, and the edits that the newest of all holds, with the release that each came with."""

    memory: Path
    releases: tuple[Release, ...]
    edits: tuple[tuple[Edit, int], ...]

    def as_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        edits = [{**edit.as_dict(), "release": number} for edit, number in self.edits]
        return {"results": {"memory": str(self.memory), "releases": list(map(asdict, self.releases)), "edits": edits}}


def log(memory: Path, *, edit: str | None = None) -> LogReport:
    """Read a memory's history, checking that no line of it was altered and that the memory is what came of it.

    Args:
        edit: id of an edit; only releases that touched it are listed, and only it.

    Raises:
        MemoryHistoryError: the memory has no history.
        DamagedFileError: the log or the memory was altered.
    """
    releases = read_history(memory)
    require_newest(memory, releases, read_manifest(memory).memory.file)
    came = {name: release.number for release in releases for name in release.added}
    held = [one for directory in directories_of(memory, releases[-1]) for one in directory.written]
    edits = tuple((one, came.get(one.id, 0)) for one in held if edit in (None, one.id))
    return LogReport(memory, tuple(_of(releases, edit)), edits)


def _of(releases: Sequence[Release], edit: str | None) -> Sequence[Release]:
    if edit is None:
        return releases
    return [one for one in releases if edit in (*one.added, *one.removed, *one.superseded, *one.superseded.values())]
