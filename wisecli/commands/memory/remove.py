"""``wise remove``: edits out of a memory, as if they had never been in it."""

import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.commands.edit.writing import run
from wisecli.config import EditSettings, LoadOptions, settings_from
from wisecli.editing.run.job import Job, settings_at
from wisecli.errors import SettingsError
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import Change, Provenance, Release, anew_prefix, changing
from wisecli.memory.history.releases import publish
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
    """A release's shards without some edits; ``new`` are directories of those that had to be trained anew."""

    shards: dict[str, tuple[str, ...]]
    new: dict[str, Path]
    rewritten: tuple[str, ...]


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
        opened = OpenMemory(memory)
        opened.require_whole()
        edits = opened.edits(opened.releases[-1])
        held = {edit.id for edit in edits}
        if missing := [name for name in ids if name not in held]:
            raise SettingsError(f"{memory} holds no edit {missing[0]!r}; `wise inspect {memory}` lists what it holds")
        followed = consequences_of(edits, ids)
        gone = (*dict.fromkeys(ids), *followed)
        with without_edits(opened, gone, model=model, load=load, on_progress=on_progress) as left:
            change = Change("remove", left.shards, removed=gone, provenance=provenance)
            published = publish(opened, change, opened.merging, new=left.new, model=model, on_progress=on_progress)
    seconds = time.perf_counter() - started
    return RemoveReport(memory, published.release, published.held, left.rewritten, seconds, followed)


@contextmanager
def without_edits(
    memory: OpenMemory,
    ids: Collection[str],
    *,
    model: str | None,
    load: LoadOptions = LoadOptions(),
    on_progress: ProgressCallback,
) -> Iterator[Cleared]:
    """Return a context with the newest release's shards without some edits; what has to be trained anew for that is
    there while the block lasts.
    """
    if not memory.releases:
        yield Cleared({}, {}, ())
        return
    release, trained = memory.releases[-1], not memory.merging.for_lookup and memory.merging.method != EXACT
    held = {name: shard.directory for name, shard in memory.reduced_shards(release).items()}
    anew = {name: _mates(directory, ids) for name, directory in held.items() if trained and _mates(directory, ids)}
    shards = {
        name: (*release.shards[name], *ids_among(directory, {*ids, *anew.get(name, ())}))
        for name, directory in held.items()
    }
    parent, prefix = memory.path.absolute().parent, anew_prefix(memory.path)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as working:
        new: dict[str, Path] = {}
        for name, others in anew.items():
            place = memory.name_after(new)
            new[place] = Path(working) / place
            run(_job_of_edits(held[name], others, model, load), new[place], on_progress=on_progress)
        rewritten = tuple(name for names in anew.values() for name in names)
        yield Cleared({**shards, **dict.fromkeys(new, ())}, new, rewritten)


def _mates(directory: ShardDirectory, ids: Collection[str]) -> tuple[str, ...]:
    """Return the edits that share a trained shard with a removed one."""
    return tuple(name for entry in without(directory, ids).trained for name in entry.edits if name not in ids)


def ids_among(directory: ShardDirectory, ids: Collection[str]) -> tuple[str, ...]:
    """Return those of ``ids`` whose edits shards hold, in order."""
    return tuple(edit.id for edit in directory.written if edit.id in ids)


def _job_of_edits(directory: ShardDirectory, names: Collection[str], model: str | None, load: LoadOptions) -> Job:
    """Return some edits of a directory of shards once more, as they were written."""
    made = directory.made
    settings = settings_from(EditSettings, settings_at(directory.site, directory.settings))
    settings = replace(settings, layer=str(directory.site.layer), shards=None)
    edits = tuple(edit for edit in directory.edits if edit.id in names)
    return Job(
        model=model or directory.model,
        settings=settings,
        edits=edits,
        load=replace(load, revision=directory.revision, date=made.date),
        target_module=made.target_module,
        threads=made.threads,
    )
