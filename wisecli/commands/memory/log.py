"""``wise log``: what was done to a memory, when and by whom; or the life of one edit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wisecli.artifacts.checksums import require_signature
from wisecli.edits.checks.signatures import Signed
from wisecli.edits.record import Edit, consequences_in
from wisecli.errors import SettingsError
from wisecli.io.consistent_read import read_consistently
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import Release, has_full_digests


@dataclass(frozen=True)
class LogReport:
    """Releases, the oldest first, and the edits that the newest of all holds, with the release that each came with.

    ``consequences`` are the ids of all that ever came as following from an edit.
    ``bound`` says whether all files are under digests, which older versions did not take.
    """

    memory: Path
    releases: tuple[Release, ...]
    edits: tuple[tuple[Edit, int], ...]
    bound: bool = True
    consequences: frozenset[str] = frozenset()

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        edits = [{**edit.as_dict(), "release": number} for edit, number in self.edits]
        results = {"memory": str(self.memory), "releases": list(map(asdict, self.releases)), "edits": edits}
        return {"results": {**results, "consequences": sorted(self.consequences), "bound": self.bound}}


def log(memory: Path, *, edit: str | None = None, signed: Signed | None = None) -> LogReport:
    """Read a memory's history, checking that no byte of it was altered and that the memory is what came of it.

    Args:
        edit: id of an edit; only releases that touched it are listed, and only it.
        signed: the signature that the newest release must have.

    Raises:
        MemoryHistoryError: the memory has no history.
        SettingsError: it never held that edit.
        DamagedFileError: the log or the memory was altered.
        SignatureError: the newest release was not signed as it must be.
    """
    return read_consistently(memory, lambda: _logged(memory, edit, signed))


def _logged(memory: Path, edit: str | None, signed: Signed | None) -> LogReport:
    """Return the releases of a memory, and the release each of its edits came with."""
    require_signature(memory, signed)
    opened = OpenMemory(memory)
    opened.require_whole()
    releases = opened.releases
    touched = _of(releases, edit)
    if not touched:
        raise SettingsError(f"no release of {memory} touched an edit {edit!r}; `wise log {memory}` lists them all")
    came = {name: release.number for release in releases for name in release.added}
    held = opened.edits(releases[-1])
    edits = tuple((known, came.get(known.id, 0)) for known in held if edit in (None, known.id))
    shards = dict.fromkeys(name for release in releases for name in release.shards)
    written = (known for name in shards for known in opened.shards(name).edits)
    followed = frozenset(consequence.id for consequence in consequences_in(written))
    return LogReport(memory, tuple(touched), edits, has_full_digests(releases), followed)


def _of(releases: Sequence[Release], edit: str | None) -> Sequence[Release]:
    """Return the releases that added, removed or superseded an edit; all if none is named."""
    if edit is None:
        return releases
    return [
        release
        for release in releases
        if edit in (*release.added, *release.removed, *release.superseded, *release.superseded.values())
    ]
