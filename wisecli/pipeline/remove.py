"""``wise remove``: edits out of a memory, as if they had never been in it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wisecli.config import EditSettings, settings_from
from wisecli.errors import SettingsError
from wisecli.events import Watcher, ignore
from wisecli.history import Change, Release, changing, next_name, read_history
from wisecli.joining import EXACT
from wisecli.pipeline.edit import run
from wisecli.releases import directories_of, publish, settings_of
from wisecli.removal import without
from wisecli.shard_directory import ShardDirectory, ShardEntry
from wisecli.work import Job


@dataclass(frozen=True)
class RemoveReport:
    """What was taken out; ``rewritten`` names edits that were trained anew, as their shard could not be had without."""

    memory: Path
    release: Release
    held: int
    rewritten: tuple[str, ...]
    seconds: float


def remove(
    memory: Path,
    ids: Sequence[str],
    *,
    model: str | None = None,
    reason: str = "",
    who: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    watch: Watcher = ignore,
) -> RemoveReport:
    """Take edits out of a memory.

    What the closed form wrote is solved for anew from the keys and residuals of the other edits, without the model. Of
    shards that were trained, the other edits are trained anew.

    Raises:
        SettingsError: the memory does not hold an edit, or would hold none.
        WiseError: the memory or the model cannot be used; the memory is as it was.
    """
    started = time.perf_counter()
    with changing(memory):
        releases = read_history(memory)
        newest, settings = releases[-1], settings_of(releases[-1])
        held = dict(zip(newest.shards, directories_of(memory, newest), strict=True))
        known = {edit.id for directory in held.values() for edit in directory.written}
        if missing := [name for name in ids if name not in known]:
            raise SettingsError(f"{memory} holds no edit {missing[0]!r}; `wise log {memory}` lists what it holds")
        if known <= set(ids):
            raise SettingsError("no edit would be left; delete the memory instead")
        kept = {name: without(directory, ids) for name, directory in held.items()}
        in_matrices = settings.mode != "lookup" and settings.method != EXACT
        anew = {name: one.trained for name, one in kept.items() if one.trained and in_matrices}
        rest = {name: _rest(ids, entries) for name, entries in anew.items()}
        gone = {name: (*newest.shards[name], *_both(held[name], {*ids, *rest.get(name, ())})) for name in held}
        with tempfile.TemporaryDirectory(dir=memory.absolute().parent, prefix=f".{memory.name}.") as working:
            new: dict[str, Path] = {}
            for name, names in rest.items():
                if names:
                    place = f"{int(next_name(memory)) + len(new):04d}"
                    new[place] = Path(working) / place
                    job = _job(held[name], names, model, device, dtype, trust_remote_code=trust_remote_code)
                    run(job, new[place], watch=watch)
            change = Change("remove", {**gone, **dict.fromkeys(new, ())}, removed=tuple(ids), reason=reason)
            published = publish(memory, change, settings, new=new, model=model, who=who, watch=watch)
    rewritten = tuple(name for names in rest.values() for name in names)
    seconds = time.perf_counter() - started
    return RemoveReport(memory, published.release, len(published.manifest.edits), rewritten, seconds)


def _both(directory: ShardDirectory, names: set[str]) -> tuple[str, ...]:
    return tuple(edit.id for edit in directory.written if edit.id in names)


def _rest(ids: Sequence[str], entries: Sequence[ShardEntry]) -> tuple[str, ...]:
    """The edits that share a shard with one that goes."""
    return tuple(name for entry in entries for name in entry.edits if name not in ids)


def _job(
    directory: ShardDirectory,
    names: Sequence[str],
    model: str | None,
    device: str,
    dtype: str,
    *,
    trust_remote_code: bool,
) -> Job:
    """Some edits of a directory of shards once more, as they were written."""
    made = directory.made
    settings = replace(settings_from(EditSettings, directory.settings), layer=str(directory.site.layer), shards=None)
    edits = tuple(edit for edit in directory.edits if edit.id in names)
    source = model or directory.model
    given = (source, directory.revision, made.target_module, device, dtype, trust_remote_code, None, made.threads)
    return Job(*given, settings, edits)
