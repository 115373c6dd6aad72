"""``wise merge --into``: shards that were written elsewhere → the next release of a memory."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from wisecli.artifacts.shard_manifest import MANIFEST_NAME
from wisecli.commands.memory.remove import ids_among, without_edits
from wisecli.config import MergeSettings
from wisecli.edits.checks.conflicts import outranked
from wisecli.io.digest import sha256_file
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import Change, Provenance, Release, changing, shard_path
from wisecli.memory.history.releases import Published, publish
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
    """Add shards that were written elsewhere to a memory's history, and merge all its shards by these settings.

    What is not set is as it was. Without inputs all is merged anew; if all inputs are in it already, nothing is done.

    Raises:
        WiseError: the shards or the memory cannot be used; the memory is as it was.
    """
    with changing(memory):
        opened = OpenMemory(memory, may_be_new=bool(inputs))
        held, releases = opened.require_whole(), opened.releases
        merging = _overridden(opened.merging, settings) if releases else settings
        edits = [edit for path in inputs for edit in opened.shards_at(path).written]
        if releases and inputs and merging == opened.merging and _is_made_of(memory, releases[-1], inputs):
            return Published(releases[-1], len(held), up_to_date=True)
        outdone = {place.edit.id for place, _ in outranked([(0, edit) for edit in edits], "the shards", held=held)}
        edits = [edit for edit in edits if edit.id not in outdone]
        superseded = with_consequences(held, edits, superseding(held, edits))
        added = tuple(edit.id for edit in edits)
        with without_edits(opened, superseded, model=model, on_progress=on_progress) as left:
            shards, new = dict(left.shards), dict(left.new)
            for path in inputs:
                name = opened.name_after(new)
                new[name], shards[name] = path, ids_among(opened.shards_at(path), outdone)
            change = Change("merge", shards, added=added, replaced=superseded, provenance=provenance)
            return publish(opened, change, merging, new=new, model=model, on_progress=on_progress)


def _is_made_of(memory: Path, release: Release, inputs: Sequence[Path]) -> bool:
    """Return whether a release is made of all of some shards already, with every edit of theirs."""
    whole = [shard_path(memory, name) / MANIFEST_NAME for name, gone in release.shards.items() if not gone]
    digests = set(map(sha256_file, whole))
    return all(sha256_file(path / MANIFEST_NAME) in digests for path in inputs)


def _overridden(before: MergeSettings, wanted: MergeSettings) -> MergeSettings:
    """Return a memory's settings, but for those that are asked for; another mode comes with its own defaults."""
    if wanted.mode not in (None, before.mode):
        return wanted
    default = MergeSettings()
    changed = {name: value for name, value in asdict(wanted).items() if value != getattr(default, name)}
    return replace(before, **changed)
