"""``wise diff``: what two memories, shards or exported checkpoints hold that the other does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.artifacts.file_names import SHARDS, what_is_at
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, read_manifest
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.memory.rollback import find_release
from wisecli.edits.record import Edit
from wisecli.errors import WrongDirectoryError
from wisecli.memory.history.open_memory import OpenMemory

_NOT_COMPARED = ("shards",)


@dataclass(frozen=True)
class DiffReport:
    """Edits only in the second (``added``), only in the first (``removed``), in both with another record (``changed``:
    first and second), and settings that differ, by name.
    """

    added: tuple[Edit, ...]
    removed: tuple[Edit, ...]
    changed: tuple[tuple[Edit, Edit], ...]
    settings: dict[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.added or self.removed or self.changed or self.settings)

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        return {
            "results": {
                "added": [edit.as_dict() for edit in self.added],
                "removed": [edit.as_dict() for edit in self.removed],
                "changed": [{"before": before.as_dict(), "after": after.as_dict()} for before, after in self.changed],
                "settings": {name: list(pair) for name, pair in self.settings.items()},
            }
        }


def diff(first: str, second: str) -> DiffReport:
    """Compare edits by id, and those settings that both tell of. Reads manifests alone.

    Args:
        first, second: memories, exported checkpoints or shards; ``memory@3`` or ``memory@2026-11-01`` for a release.

    Raises:
        WiseError: either cannot be read.
    """
    (before, about), (after, other) = _read(first), _read(second)
    shared = about.keys() & other.keys()
    old, new = {edit.id: edit for edit in before}, {edit.id: edit for edit in after}
    return DiffReport(
        tuple(edit for edit in after if edit.id not in old),
        tuple(edit for edit in before if edit.id not in new),
        tuple((edit, new[edit.id]) for edit in before if edit.id in new and new[edit.id] != edit),
        {name: (about.get(name), other.get(name)) for name in sorted(shared) if about.get(name) != other.get(name)},
    )


def _read(named: str) -> tuple[Sequence[Edit], Mapping[str, Any]]:
    """Return the edits and settings of a memory, a directory of shards, or a release ``memory@number``."""
    path, at, release = named.rpartition("@")
    if at and not Path(named).exists():
        return _of_release(Path(path), release)
    place = Path(named)
    if (place / MANIFEST_NAME).is_file():
        manifest = read_manifest(place)
        about = {name: value for name, value in manifest.merge.items() if name not in _NOT_COMPARED}
        thresholds = sorted({round(value, 6) for value in manifest.memory.thresholds})
        return manifest.edits, {
            **about,
            "layer": manifest.site.layer,
            "base": manifest.base.matrix,
            "thresholds": thresholds,
        }
    if not (place / SHARDS).is_file():
        raise WrongDirectoryError(place, what_is_at(place), "a memory, shards, or an exported checkpoint with a router")
    directory = read_shard_directory(place)
    return directory.written, {**directory.settings, "base": directory.fingerprint.matrix}


def _of_release(memory: Path, wanted: str) -> tuple[Sequence[Edit], Mapping[str, Any]]:
    opened = OpenMemory(memory)
    release = find_release(opened, wanted)
    edits, shards = opened.edits(release), opened.newest_shards(release.number)
    return edits, {**release.merge, "layer": shards.site.layer, "base": shards.fingerprint.matrix}
