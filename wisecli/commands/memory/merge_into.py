"""``wise merge --into``: shards that were written elsewhere → the next release of a memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from wisecli.artifacts.shard_manifest import MANIFEST_NAME, read_shard_directory
from wisecli.commands.memory.remove import without_edits
from wisecli.config import LoadOptions, MergeSettings
from wisecli.edits.checks.conflicts import outranked
from wisecli.errors import MemoryHistoryError
from wisecli.io.digest import sha256_file
from wisecli.memory.history.release_log import (
    Change,
    Provenance,
    Release,
    changing,
    has_history,
    read_history,
    require_whole,
    shard_path,
)
from wisecli.memory.history.releases import Published, merging_of, name_after, publish
from wisecli.memory.history.superseded_edits import superseding, with_consequences
from wisecli.progress import ProgressCallback, ignore_progress


def merge_into(
    inputs: Sequence[Path],
    memory: Path,
    settings: MergeSettings,
    *,
    model: str | None = None,
    provenance: Provenance = Provenance(),
    on_progress: ProgressCallback = ignore_progress,
) -> Published:
    """Take shards that were written elsewhere into a memory's history, and join all that it holds by these settings.

    What is not set is as it was. Without inputs the memory is merged anew; if it is made of all inputs already, nothing
    is done.

    Raises:
        WiseError: the shards or the memory cannot be used; the memory is as it was.
    """
    with changing(memory):
        releases = read_history(memory) if has_history(memory) else []
        if not releases and (not inputs or (memory.exists() and any(memory.iterdir()))):
            raise MemoryHistoryError(memory)
        held = require_whole(memory, releases).edits if releases else ()
        merging = _overridden(merging_of(releases), settings) if releases else settings
        edits = [edit for path in inputs for edit in read_shard_directory(path).written]
        if releases and inputs and merging == merging_of(releases) and _holds(memory, releases[-1], inputs):
            return Published(releases[-1], len(held), up_to_date=True)
        outdone = {place.edit.id for place, _ in outranked([(0, edit) for edit in edits], "the shards", held=held)}
        edits = [edit for edit in edits if edit.id not in outdone]
        superseded = with_consequences(held, edits, superseding(held, edits))
        added = tuple(edit.id for edit in edits)
        with without_edits(memory, releases, superseded, model, LoadOptions(), on_progress) as left:
            new = dict(left.new)
            for path in inputs:
                new[name_after(memory, new)] = path
            taken = {name: _among(path, outdone if path in inputs else ()) for name, path in new.items()}
            shards = {**left.shards, **taken}
            change = Change("merge", shards, added=added, replaced=superseded, provenance=provenance)
            return publish(memory, change, merging, new=new, read=left.read, model=model, on_progress=on_progress)


def _among(path: Path, ids: Collection[str]) -> tuple[str, ...]:
    """Return those edits that shards hold."""
    return tuple(edit.id for edit in read_shard_directory(path).written if edit.id in ids)


def _holds(memory: Path, release: Release, inputs: Sequence[Path]) -> bool:
    """Return whether a release is made of all of some shards already, with every edit of theirs."""
    whole = [shard_path(memory, name) / MANIFEST_NAME for name, gone in release.shards.items() if not gone]
    digests = set(map(sha256_file, whole))
    return all(sha256_file(path / MANIFEST_NAME) in digests for path in inputs)


def _overridden(before: MergeSettings, wanted: MergeSettings) -> MergeSettings:
    """Settings of a memory, but for those that are asked for; who asks for another mode gets its own defaults."""
    if wanted.mode not in (None, before.mode):
        return wanted
    default = MergeSettings()
    changed = {name: value for name, value in asdict(wanted).items() if value != getattr(default, name)}
    return replace(before, **changed)
