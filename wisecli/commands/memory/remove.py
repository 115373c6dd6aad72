"""``wise remove``: edits out of a memory, as if they had never been in it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.commands.edit.writing import run
from wisecli.config import EditSettings, LoadOptions, settings_from
from wisecli.editing.run.job import Job
from wisecli.errors import SettingsError
from wisecli.memory.history.release_log import (
    Change,
    Provenance,
    Release,
    anew_prefix,
    changing,
    next_name,
    read_history,
    require_whole,
)
from wisecli.memory.history.releases import directories_of, publish, settings_of, shards_of
from wisecli.memory.history.superseded_edits import consequences_of
from wisecli.memory.merging.merger import EXACT
from wisecli.memory.merging.removal import without
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class RemoveReport:
    """What was taken out; ``rewritten`` names edits that were trained anew, as their shard could not be had without.

    ``consequences`` are those that went with their edits.
    """

    memory: Path
    release: Release
    held: int
    rewritten: tuple[str, ...]
    seconds: float
    consequences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cleared:
    """A release's shards without some edits; ``new`` are directories of those that had to be trained anew, and ``read``
    what was read of the others.
    """

    shards: dict[str, tuple[str, ...]]
    new: dict[str, Path]
    rewritten: tuple[str, ...]
    read: Mapping[str, ShardDirectory] = field(default_factory=dict)


def remove(
    memory: Path,
    ids: Sequence[str],
    *,
    model: str | None = None,
    provenance: Provenance = Provenance(),
    load: LoadOptions = LoadOptions(),
    on_progress: ProgressCallback = ignore_progress,
) -> RemoveReport:
    """Take edits out of a memory, and with each its consequences.

    What the closed form wrote is solved for anew from the keys and residuals of the other edits, without the model. Of
    shards that were trained, the other edits are trained anew. Without its last edit a memory is empty, and the model
    answers as its base does.

    Raises:
        SettingsError: the memory does not hold an edit.
        WiseError: the memory or the model cannot be used; the memory is as it was.
    """
    started = time.perf_counter()
    with changing(memory):
        releases = read_history(memory)
        require_whole(memory, releases)
        newest = releases[-1]
        edits = [edit for directory in directories_of(memory, newest) for edit in directory.written]
        held = {edit.id for edit in edits}
        if missing := [name for name in ids if name not in held]:
            raise SettingsError(f"{memory} holds no edit {missing[0]!r}; `wise inspect {memory}` lists what it holds")
        followed = consequences_of(edits, ids)
        gone = (*dict.fromkeys(ids), *followed)
        with cleared(memory, newest, gone, model=model, load=load, on_progress=on_progress) as left:
            change = Change("remove", left.shards, removed=gone, provenance=provenance)
            published = publish(
                memory,
                change,
                settings_of(newest),
                new=left.new,
                read=left.read,
                model=model,
                on_progress=on_progress,
            )
    seconds = time.perf_counter() - started
    return RemoveReport(memory, published.release, published.held, left.rewritten, seconds, followed)


@contextmanager
def cleared(
    memory: Path,
    release: Release,
    ids: Collection[str],
    *,
    model: str | None,
    load: LoadOptions,
    on_progress: ProgressCallback,
    read: Mapping[str, ShardDirectory] = MappingProxyType({}),
) -> Iterator[Cleared]:
    """A release's shards without some edits; what has to be trained anew for that is there while the block lasts.

    Args:
        read: directories of shards that were read already, by their names.
    """
    settings = settings_of(release)
    reduced = shards_of(memory, release, read)
    held = {name: one.directory for name, one in reduced.items()}
    whole = {name: one.whole for name, one in reduced.items()}
    trained = not settings.for_lookup and settings.method != EXACT
    anew = {name: _beside(directory, ids) for name, directory in held.items() if trained and _beside(directory, ids)}
    shards = {
        name: (*release.shards[name], *_in(directory, {*ids, *anew.get(name, ())})) for name, directory in held.items()
    }
    first = int(next_name(memory))
    with tempfile.TemporaryDirectory(dir=memory.absolute().parent, prefix=anew_prefix(memory)) as working:
        new: dict[str, Path] = {}
        for name, others in anew.items():
            place = f"{first + len(new):04d}"
            new[place] = Path(working) / place
            run(_job(held[name], others, model, load), new[place], on_progress=on_progress)
        rewritten = tuple(name for names in anew.values() for name in names)
        yield Cleared({**shards, **dict.fromkeys(new, ())}, new, rewritten, whole)


def _beside(directory: ShardDirectory, ids: Collection[str]) -> tuple[str, ...]:
    """Return the edits that share a trained shard with one that goes."""
    return tuple(name for entry in without(directory, ids).trained for name in entry.edits if name not in ids)


def _in(directory: ShardDirectory, names: Collection[str]) -> tuple[str, ...]:
    return tuple(edit.id for edit in directory.written if edit.id in names)


def _job(directory: ShardDirectory, names: Collection[str], model: str | None, load: LoadOptions) -> Job:
    """Return some edits of a directory of shards once more, as they were written."""
    made = directory.made
    settings = replace(settings_from(EditSettings, directory.settings), layer=str(directory.site.layer), shards=None)
    edits = tuple(edit for edit in directory.edits if edit.id in names)
    return Job(
        model=model or directory.model,
        settings=settings,
        edits=edits,
        load=replace(load, revision=directory.revision, date=made.date),
        target_module=made.target_module,
        threads=made.threads,
    )


def without_edits(
    memory: Path,
    releases: Sequence[Release],
    ids: Collection[str],
    model: str | None,
    load: LoadOptions,
    on_progress: ProgressCallback,
    read: Mapping[str, ShardDirectory] = MappingProxyType({}),
) -> AbstractContextManager[Cleared]:
    """Return the newest release's shards, without the edits that give way; ``read`` as of :func:`cleared`."""
    if not releases:
        return nullcontext(Cleared({}, {}, ()))
    return cleared(memory, releases[-1], ids, model=model, load=load, on_progress=on_progress, read=read)
