"""Makes the next release of a memory: merges its shards anew, and adds a line to its log."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wisecli.artifacts.checksums import write_checksums
from wisecli.artifacts.memory_manifest import MEMORY_NAME, Manifest, write_memory
from wisecli.artifacts.shard_manifest import MANIFEST_NAME as SHARDS_MANIFEST
from wisecli.artifacts.shard_manifest import UNRELATED_NAME, ShardDirectory
from wisecli.config import MergeSettings
from wisecli.io.atomic_output import link_or_copy
from wisecli.io.safe_paths import inside
from wisecli.memory.history.former_release import former_memory, write_probs
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import HISTORY, SHARDS, Change, Provenance, Release, next_release, record
from wisecli.memory.merging.empty_memory import empty_memory
from wisecli.memory.merging.merger import Merged, Merger
from wisecli.memory.merging.removal import ReducedShards, without
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class Published:
    """A release in its place, and how many edits it holds; ``up_to_date`` if it was there already."""

    release: Release
    held: int
    up_to_date: bool = False


def publish(
    memory: OpenMemory,
    change: Change,
    settings: MergeSettings,
    *,
    new: Mapping[str, Path],
    anew: bool = False,
    model: str | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Published:
    """Merge the shards that a change names and replace the memory by the result; whole, or not at all.

    Args:
        new: directories of shards that the memory's history does not have yet, by the names they will have.
        anew: whether to reuse nothing of the newest release, as its tensors may have been altered.

    Raises:
        WiseError: the shards cannot be joined, or the disk is full; the memory stays as it was.
    """
    kept = {
        name: without(memory.shards_at(new[name]) if name in new else memory.shards(name), gone)
        for name, gone in change.shards.items()
    }
    kept = {name: reduced for name, reduced in kept.items() if reduced.directory.shards}
    change = replace(change, shards={name: change.shards[name] for name in kept})
    if kept:
        merger = Merger(list(kept.values()), settings, model=model)
        former = None if anew else former_memory(memory, change.shards, merger)
        merged = merger.merge(on_progress, former=former)
        manifest = _with_own_paths(merged.manifest, list(kept))
    else:
        merged = Merged(empty_memory(memory.newest_shards(), settings, model=model), None)
        manifest = merged.manifest
    with next_release(memory.path) as working:
        return _write_release(working, Merged(replace(manifest, origins=()), merged.probs), change, kept, new)


def publish_first(memory: Path, merged: Merged, inputs: Sequence[ReducedShards], provenance: Provenance) -> Published:
    """Replace a memory by what shards were merged into, with a history that begins there.

    Args:
        inputs: those shards, in order.

    Raises:
        WiseError: the disk is full; what was there is as it was.
    """
    kept = {f"{number:04d}": reduced for number, reduced in enumerate(inputs, start=1) if reduced.directory.shards}
    paths = {name: reduced.directory.path for name, reduced in kept.items()}
    change = Change(
        "merge",
        {name: _ids_left_out(reduced) for name, reduced in kept.items()},
        added=tuple(edit.id for edit in merged.manifest.edits),
        provenance=provenance,
    )
    merged = merged._replace(manifest=_with_own_paths(merged.manifest, list(kept)))
    with next_release(memory, afresh=True) as working:
        return _write_release(working, merged, change, kept, paths)


def _ids_left_out(kept: ReducedShards) -> tuple[str, ...]:
    """Return the ids of a directory's edits that are left out of a release."""
    counted = {edit.id for edit in kept.directory.written}
    return tuple(edit.id for edit in kept.whole.written if edit.id not in counted)


def _write_release(
    working: Path, merged: Merged, change: Change, kept: Mapping[str, ReducedShards], new: Mapping[str, Path]
) -> Published:
    """Write a release into its working directory.

    Args:
        kept: the shards that it is merged from, by their names.
        new: where those are that its history does not have yet.
    """
    for name in new:
        if name in kept:
            _link_shards(kept[name].whole, working / HISTORY / SHARDS / name)
            _share_statistics(working / HISTORY / SHARDS / name, kept, name)
    manifest = merged.manifest
    digest = write_memory(working, manifest, sealed=True)
    write_probs(working, merged.probs, digest)
    release = record(working, manifest, change, digest=digest)
    # Shards were just read, and their digests checked.
    shards = {
        f"{HISTORY}/{SHARDS}/{name}/{entry.file}": entry.sha256
        for name, reduced in kept.items()
        for entry in reduced.directory.shards
    }
    write_checksums(working, change.provenance.key, known={**shards, MEMORY_NAME: digest})
    return Published(release, len(manifest.edits))


def _link_shards(shards: ShardDirectory, place: Path) -> None:
    """Bring shards into a history, by hard links where the disk has them."""
    place.mkdir(parents=True)
    for file in (*(entry.file for entry in shards.shards), UNRELATED_NAME):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(inside(shards.path, file), place / file)
    shutil.copyfile(shards.path / SHARDS_MANIFEST, place / SHARDS_MANIFEST)


def _share_statistics(place: Path, kept: Mapping[str, ReducedShards], name: str) -> None:
    """Link the statistics of unrelated text, which all shards of a model share, so that they are kept once."""
    mine = kept[name].directory
    for other in (reduced.directory for reduced in kept.values() if reduced.directory.path != mine.path):
        if other.unrelated_sha256 == mine.unrelated_sha256:
            (place / UNRELATED_NAME).unlink()
            link_or_copy(other.path / UNRELATED_NAME, place / UNRELATED_NAME)
            return


def _with_own_paths(manifest: Manifest, names: list[str]) -> Manifest:
    """Return a manifest that names shards by their paths in the memory."""
    listed = [
        [f"{HISTORY}/{SHARDS}/{name}", count] for name, (_, count) in zip(names, manifest.merge["shards"], strict=True)
    ]
    return replace(manifest, merge={**manifest.merge, "shards": listed})
