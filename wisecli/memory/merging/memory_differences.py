"""The differences between a memory and what a merge of shards would make."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wisecli.artifacts.checksums import altered, check_checksums
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, MemoryManifest, Origin, read_manifest
from wisecli.artifacts.shard_manifest import MANIFEST_NAME as SHARDS_MANIFEST
from wisecli.artifacts.shard_manifest import origin_of
from wisecli.artifacts.up_to_date import require_same, unsigned, up_to_date
from wisecli.edits.edit_differences import describe_differences
from wisecli.environment import changed_versions
from wisecli.errors import DamagedFileError, OutputExistsError
from wisecli.io.checkpoint import EXPORT_RECORD, read_json
from wisecli.io.digest import sha256_file
from wisecli.memory.history.release_log import has_history, read_history, require_whole, shard_path
from wisecli.memory.merging.merger import Merger


def up_to_date_memory(merger: Merger, output: Path, *, history: bool, signed: bool = False) -> MemoryManifest | None:
    """Return the manifest of the memory at ``output`` if it is what a merge would make; ``None`` if none is there.

    Args:
        history: whether it is to have one.
        signed: whether it is to be signed.

    Raises:
        OutputExistsError: the memory is another, or damaged; naming what differs.
    """

    def changes(found: MemoryManifest) -> Iterator[str]:
        yield from ["it is an export"] if _is_export(output) else _changes(found, merger)
        if has_history(output) != history:
            yield "it has no history" if history else "it has a history"

    def damage(found: MemoryManifest) -> list[str]:
        return altered(check_checksums(output, expected=found.sealed))

    return up_to_date(output / MANIFEST_NAME, read_manifest, changes, damage, signed=signed)


@dataclass(frozen=True)
class ExtendedMemory:
    """A memory that was changed since shards were merged into it, and ids of their edits that it no longer holds."""

    manifest: MemoryManifest
    gone: tuple[str, ...] = ()


def extended_memory(merger: Merger, output: Path, *, signed: bool = False) -> ExtendedMemory | None:
    """Return the memory at ``output`` if its newest release is made of some shards, and of others that came since.

    Edits of theirs that gave way to others, or were removed, stay so.

    Args:
        merger: of those shards, by the settings that are asked for.
        signed: whether the memory is to be signed.

    Returns:
        None if the newest release is not made of all of them.

    Raises:
        OutputExistsError: it is, but merged otherwise, or damaged; naming what differs.
    """
    try:
        releases = read_history(output)
        found = require_whole(output, releases)
        digests = {sha256_file(shard_path(output, name) / SHARDS_MANIFEST) for name in releases[-1].shards}
    except DamagedFileError as error:
        raise OutputExistsError(output, [str(error)]) from None
    if not all(sha256_file(directory.path / SHARDS_MANIFEST) in digests for directory in merger.directories):
        return None
    changes = [*_changed_settings(found, merger), *changed_versions(found.versions)]
    require_same(output, [*changes, *unsigned(output, signed=signed)])
    held = {(edit.id, edit.prompt, edit.answer) for edit in found.edits}
    new = tuple(edit.id for edit in merger.edits if (edit.id, edit.prompt, edit.answer) not in held)
    return ExtendedMemory(found, new)


def _is_export(output: Path) -> bool:
    return (output / "config.json").exists() or EXPORT_RECORD in read_json(output / MANIFEST_NAME)


def _changes(found: MemoryManifest, merger: Merger) -> Iterator[str]:
    """Yield what a merge asks for otherwise than a memory was made, each as a phrase."""
    yield from _changed_settings(found, merger)
    yield from describe_differences(found.edits, merger.edits)
    origins = [origin_of(directory) for directory in merger.directories]
    if len(found.origins) != len(origins) or not all(map(_same_origin, found.origins, origins)):
        yield "the shards are others"
    yield from changed_versions(found.versions)


def _changed_settings(found: MemoryManifest, merger: Merger) -> Iterator[str]:
    if found.base.model != merger.model:
        yield f"the base model was {found.base.model}, now {merger.model}"
    wanted = json.loads(json.dumps(asdict(merger.settings)))
    for name, now in wanted.items():
        if (before := found.merge.get(name)) != now:
            yield f"{name} was {before}, now {now}"


def _same_origin(before: Origin, now: Origin) -> bool:
    """Return whether two origins describe the same shards, at whatever paths."""
    digest = now.manifest if before.manifest is None else before.manifest
    return replace(before, path=now.path, manifest=digest) == now
