"""Making the next release of a memory: its shards joined anew, and a line in its log."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wisecli.artifacts.memory_manifest import MEMORY_NAME, Manifest, write_memory
from wisecli.artifacts.seal import write_seal
from wisecli.artifacts.shard_manifest import UNRELATED_NAME, ShardDirectory, read_shard_directory
from wisecli.config import MergeSettings, settings_from
from wisecli.io.atomic_output import link_or_copy
from wisecli.memory.history import HISTORY, SHARDS, Change, Release, next_name, next_release, record, shard_path
from wisecli.memory.merger import Merger
from wisecli.memory.removal import Kept, without
from wisecli.progress import Watcher, ignore


@dataclass(frozen=True)
class Published:
    """A release that is in place."""

    release: Release
    manifest: Manifest


def publish(
    memory: Path,
    change: Change,
    settings: MergeSettings,
    *,
    new: Mapping[str, Path],
    model: str | None = None,
    watch: Watcher = ignore,
) -> Published:
    """Join the shards that a change names and put the outcome in the memory's place; whole, or not at all.

    Args:
        new: where directories of shards are that the memory's history does not have yet, by the names they will have.

    Raises:
        WiseError: they cannot be joined, or the disk is full; the memory is as it was.
    """
    kept = {name: _kept(memory, name, gone, new) for name, gone in change.shards.items()}
    kept = {name: one for name, one in kept.items() if one.directory.shards}
    change = replace(change, shards={name: change.shards[name] for name in kept})
    manifest = _at_home(Merger(list(kept.values()), settings, model=model).merge(watch), list(kept))
    with next_release(memory) as working:
        for name, path in new.items():
            place = working / HISTORY / SHARDS / name
            shutil.copytree(path, place, copy_function=link_or_copy)
            _share(place, kept, name)
        write_memory(working, manifest, sealed=True)
        release = record(working, manifest, change, file=MEMORY_NAME)
        write_seal(working)
    return Published(release, manifest)


def _share(place: Path, kept: Mapping[str, Kept], name: str) -> None:
    """What the model makes of unrelated text is the same in every round, and kept once."""
    mine = kept[name].directory
    for other in (one.directory for one in kept.values() if one.directory.path != mine.path):
        if other.unrelated_sha256 == mine.unrelated_sha256:
            (place / UNRELATED_NAME).unlink()
            link_or_copy(other.path / UNRELATED_NAME, place / UNRELATED_NAME)
            return


def settings_of(release: Release) -> MergeSettings:
    """How a release was merged."""
    return settings_from(MergeSettings, release.merge)


def directories_of(memory: Path, release: Release) -> list[ShardDirectory]:
    """The shards that a release is merged from, without the edits that do not count."""
    return [_kept(memory, name, gone, {}).directory for name, gone in release.shards.items()]


def _kept(memory: Path, name: str, gone: tuple[str, ...], new: Mapping[str, Path]) -> Kept:
    return without(read_shard_directory(new.get(name) or shard_path(memory, name)), gone)


def _at_home(manifest: Manifest, names: list[str]) -> Manifest:
    """The same manifest; shards are named by where they are in the memory, and edits that do not count by nothing."""
    listed = [
        [f"{HISTORY}/{SHARDS}/{name}", count] for name, (_, count) in zip(names, manifest.merge["shards"], strict=True)
    ]
    return replace(manifest, merge={**manifest.merge, "shards": listed}, origins=())


def merging_of(releases: Sequence[Release]) -> MergeSettings:
    """The settings that the newest release was merged by; the defaults of a memory that has none yet."""
    return settings_of(releases[-1]) if releases else MergeSettings()


def name_after(memory: Path, new: Mapping[str, Path]) -> str:
    """A name for the shards after those that are new, too."""
    return f"{int(next_name(memory)) + len(new):04d}"
