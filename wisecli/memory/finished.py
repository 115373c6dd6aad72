"""Whether the memory that a merge asks for is there already: of the same shards, by the same settings, and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from wisecli.artifacts.memory_manifest import MANIFEST_NAME, MemoryManifest, Origin, read_manifest
from wisecli.artifacts.seal import altered, is_signed
from wisecli.artifacts.shard_manifest import origin_of
from wisecli.edits.changes import changed_edits
from wisecli.environment import changed_versions
from wisecli.errors import DamagedFileError, OutputExistsError
from wisecli.io.checkpoint import EXPORT_RECORD, read_json
from wisecli.memory.history import has_history
from wisecli.memory.merger import Merger


def finished_memory(merger: Merger, output: Path, *, history: bool, signed: bool = False) -> MemoryManifest | None:
    """The manifest of the memory at ``output`` if it is what shards would be merged into; ``None`` if none is there.

    Args:
        history: whether it is to have one.
        signed: whether it is to be signed.

    Raises:
        OutputExistsError: the memory is another, or damaged; naming what differs.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        found = read_manifest(output)
        changes = ["it is an export"] if _is_export(output) else list(_changes(found, merger))
        if has_history(output) != history:
            changes.append("it has no history" if history else "it has a history")
        if signed and not is_signed(output):
            changes.append("it is not signed")
        changes = changes or altered(output, expected=found.sealed)
    except DamagedFileError as error:
        changes = [str(error)]
    if changes:
        raise OutputExistsError(output, changes)
    return found


def _is_export(output: Path) -> bool:
    return (output / "config.json").exists() or EXPORT_RECORD in read_json(output / MANIFEST_NAME)


def _changes(found: MemoryManifest, merger: Merger) -> Iterator[str]:
    """What a merge asks for otherwise than a memory was made, each as a phrase."""
    if found.base.model != merger.model:
        yield f"the base model was {found.base.model}, now {merger.model}"
    wanted = json.loads(json.dumps(asdict(merger.settings)))
    for name, now in wanted.items():
        if (before := found.merge.get(name)) != now:
            yield f"{name} was {before}, now {now}"
    yield from changed_edits(found.edits, merger.edits)
    origins = [origin_of(directory) for directory in merger.directories]
    if len(found.origins) != len(origins) or not all(map(_alike, found.origins, origins)):
        yield "the shards are others"
    yield from changed_versions(found.versions)


def _alike(before: Origin, now: Origin) -> bool:
    """Whether two say the same of shards, wherever those are."""
    digest = now.manifest if before.manifest is None else before.manifest
    return replace(before, path=now.path, manifest=digest) == now
