"""A memory's history, of which everything is read once: releases, and what shards say of themselves."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wisecli.artifacts.checksums import has_checksums
from wisecli.artifacts.memory_manifest import MemoryManifest
from wisecli.artifacts.shard_manifest import ShardDirectory, read_shard_directory
from wisecli.config import MergeSettings, settings_from
from wisecli.edits.record import Edit
from wisecli.errors import MemoryHistoryError
from wisecli.memory.history.release_log import (
    HISTORY,
    SHARDS,
    Release,
    has_history,
    read_history,
    require_whole,
    require_whole_history,
    shard_path,
)
from wisecli.memory.merging.removal import ReducedShards, without


class OpenMemory:
    """A memory with a history: its ``releases``, the oldest first, and ``manifest``, once it was found to be whole.

    Args:
        path: its directory.
        may_be_new: whether there may be none yet, and no releases.

    Raises:
        MemoryHistoryError: there is none, or it has no history.
        DamagedFileError: its log was altered.
    """

    def __init__(self, path: Path, *, may_be_new: bool = False) -> None:
        self.path = path
        self.releases = [] if may_be_new and not has_history(path) else read_history(path)
        if not self.releases and path.exists() and any(path.iterdir()):
            raise MemoryHistoryError(path)
        self.manifest: MemoryManifest | None = None
        self._checked, self._shards = False, dict[Path, ShardDirectory]()

    @property
    def merging(self) -> MergeSettings:
        """The settings that the newest release was merged by, or the defaults if there is none yet."""
        return settings_of(self.releases[-1]) if self.releases else MergeSettings()

    def require_whole(self) -> tuple[Edit, ...]:
        """Return the edits of the newest release, if no file of it was altered; none if there is no release yet.

        Raises:
            DamagedFileError: naming what was.
        """
        self._checked = has_checksums(self.path)
        self.manifest = require_whole(self.path, self.releases) if self.releases else None
        return () if self.manifest is None else self.manifest.edits

    def require_whole_history(self) -> None:
        """Check that no file of the history was altered.

        Raises:
            DamagedFileError: naming those that were.
        """
        self._checked = has_checksums(self.path)
        require_whole_history(self.path, self.releases)

    def shards(self, name: str) -> ShardDirectory:
        """Return what shards of the history say, all their edits included."""
        return self.shards_at(shard_path(self.path, name), checked=self._checked)

    def shards_at(self, path: Path, *, checked: bool = False) -> ShardDirectory:
        """Return what shards say that are in the history, or are to join it.

        Args:
            checked: whether their files were held against digests.
        """
        if path not in self._shards:
            self._shards[path] = replace(read_shard_directory(path), files_checked=checked)
        return self._shards[path]

    def reduced_shards(self, release: Release) -> dict[str, ReducedShards]:
        """Return the shards that a release is merged from, without the edits that are left out, by their names."""
        return {name: without(self.shards(name), gone) for name, gone in release.shards.items()}

    def directories(self, release: Release) -> list[ShardDirectory]:
        """Return the same as directories, in order."""
        return [shard.directory for shard in self.reduced_shards(release).values()]

    def edits(self, release: Release) -> list[Edit]:
        """Return the edits of a release, in order."""
        return [edit for directory in self.directories(release) for edit in directory.written]

    def newest_shards(self, number: int | None = None) -> ShardDirectory:
        """Return the shards that came last, with all their edits, of the newest release that has any; an emptied memory
        has none.

        Args:
            number: of the newest release that counts.
        """
        newest = next(release for release in reversed(self.releases[:number]) if release.shards)
        return self.shards(list(newest.shards)[-1])

    def name_after(self, new: Mapping[str, Path]) -> str:
        """Return a name for the shards that follow those of the history, and new ones."""
        directory = self.path / HISTORY / SHARDS
        taken = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()] if directory.is_dir() else []
        return f"{max(taken, default=0) + 1 + len(new):04d}"


def settings_of(release: Release) -> MergeSettings:
    """Return the settings that a release was merged by."""
    return settings_from(MergeSettings, release.merge)
