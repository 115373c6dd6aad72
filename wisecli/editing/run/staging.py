"""Shards in the making: a plan, and every shard that is done, beside the output until all of them are there.

A shard is the unit. It counts as done once ``shard-….json`` lies beside its file, and both appear whole or not at all,
so a run that is killed at any moment goes on where it was, and several processes may write shards of one output; their
claims (:mod:`wisecli.editing.run.shard_locks`) keep them apart.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wisecli.artifacts.background_stats import BackgroundStats, load_background, save_background
from wisecli.artifacts.shard_manifest import (
    PLAN_NAME,
    UNRELATED_NAME,
    ShardDirectory,
    ShardEntry,
    read_shard_directory,
    write_shard_directory,
)
from wisecli.editing.run.shard_locks import ShardLocks, is_lock_file
from wisecli.errors import BusyError, DamagedFileError, ModelError, WiseError
from wisecli.io.atomic_output import link_or_copy, put_in_place, writing
from wisecli.io.checkpoint import read_json, write_json
from wisecli.io.digest import sha256_file
from wisecli.io.json_schema import CLOSED, decode


@dataclass(frozen=True)
class FinishedPart:
    """A part that is done: its shard, if any of its edits could be written, and the edits that could not."""

    __pydantic_config__ = CLOSED

    entry: ShardEntry | None
    left_out: tuple[str, ...] = ()


class StagedShards:
    """The shards of one output, as far as they are.

    Args:
        output: where they are to be in the end.
        count: how many there will be.
    """

    _claims: ShardLocks

    def __init__(self, output: Path, count: int) -> None:
        self.output, self.count = output.absolute(), count
        self.path = self.output.parent / f".{output.name}.unfinished"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Return a context in which shards can be claimed and written.

        Raises:
            NoSpaceError: the disk is full.
            UnwritableError: nothing may be written there.
        """
        with writing(self.output):
            self._claims = ShardLocks(self.path)
            try:
                yield
            finally:
                self._claims.release()

    def claim(self, numbers: range) -> None:
        """Keep other processes from writing these shards.

        Raises:
            BusyError: one of them is at it.
        """
        if not self._claims.acquire(numbers):
            raise BusyError(self.output)

    def release(self) -> None:
        """Let others have the claimed shards."""
        self._claims.release()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait until no other process plans or finishes, and keep them from it; false if one has finished meanwhile."""
        with self._claims.exclusive() as current:
            yield current

    @property
    def plan(self) -> ShardDirectory | None:
        """What was planned, if anything was."""
        if not (self.path / PLAN_NAME).is_file():
            return None
        return read_shard_directory(self.path, plan=True)

    def begin(self, plan: ShardDirectory, unrelated: BackgroundStats) -> ShardDirectory:
        """Store a plan and the statistics of unrelated text; return the plan as stored."""
        self._clear()
        self._save(UNRELATED_NAME, lambda path: save_background(path, unrelated, whole=True))
        kept = replace(plan, path=self.path, unrelated_sha256=sha256_file(self.path / UNRELATED_NAME))
        self._save(PLAN_NAME, lambda path: write_shard_directory(replace(kept, path=path.parent)))
        return kept

    def discard(self) -> None:
        """Forget the plan and all shards.

        Raises:
            BusyError: another process is at work on them.
        """
        if not self._claims.acquire(range(self.count)):
            raise BusyError(self.output)
        (self.path / PLAN_NAME).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove all but locks: without a plan, whatever is there means nothing."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif not is_lock_file(entry.name):
                entry.unlink()

    def remove(self) -> None:
        """Remove everything; only for a process that has claimed all shards."""
        (self.path / PLAN_NAME).unlink(missing_ok=True)  # first: what is left without it means nothing
        shutil.rmtree(self.path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed run left whose output was in place already, or was to be put there once more."""
        if not self.output.is_dir() or not self.path.is_dir():
            return
        with suppress(OSError, WiseError), self.opened():  # on a disk that cannot be written it may stay
            if self._claims.acquire(range(self.count)) and self._is_in_place():
                self.remove()

    def _is_in_place(self) -> bool:
        plan = self.plan
        if plan is None:
            return True
        there = read_shard_directory(self.output)
        return _entries(self._every()) == there.shards or _asked(plan) == _asked(there)

    def done(self, number: int) -> FinishedPart | None:
        """Return what is there of one shard, its file checked; ``None`` if it is still to be written."""
        found = self._listed(number)
        if found is None or found.entry is None:
            return found
        file = self.path / found.entry.file
        return found if file.is_file() and sha256_file(file) == found.entry.sha256 else None

    def missing(self) -> list[int]:
        """Return the shards that nobody has written yet."""
        return [number for number in range(self.count) if not (self.path / _done_name(number)).is_file()]

    def add(self, number: int, done: FinishedPart, write: Callable[[Path], None]) -> FinishedPart:
        """Keep a shard that ``write`` puts into a file; with its digest."""
        if done.entry is not None:
            self._save(done.entry.file, write)
            digest = sha256_file(self.path / done.entry.file)
            done = replace(done, entry=replace(done.entry, sha256=digest))
        self._save(_done_name(number), lambda path: write_json(path, asdict(done)))
        return done

    def forget(self, numbers: range) -> None:
        """Discard the claimed shards that were written."""
        for number in numbers:
            (self.path / _done_name(number)).unlink(missing_ok=True)

    def finish(self) -> ShardDirectory | None:
        """Put the shards in the place of the output, if all are there and nobody is at work on one; else ``None``.

        Raises:
            ModelError: no edit could be written at all.
        """
        plan, every = self.plan, self._every()
        if plan is None or len(every) < self.count or not self._claims.acquire(range(self.count)):
            return None
        entries = _entries(every)
        if not entries:
            raise ModelError(f"{plan.model} gives nothing finite for any of the edits; are its weights whole?")
        whole = self.path / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        for entry in entries:
            link_or_copy(self.path / entry.file, whole / entry.file)
        save_background(whole / UNRELATED_NAME, load_background(self.path / UNRELATED_NAME, plan.unrelated_sha256))
        left_out = tuple(name for done in every for name in done.left_out)
        digest = sha256_file(whole / UNRELATED_NAME)
        finished = replace(plan, path=whole, shards=entries, unrelated_sha256=digest, left_out=left_out)
        write_shard_directory(finished)
        put_in_place(whole, self.output)
        self.remove()
        return replace(finished, path=self.output)

    def _every(self) -> list[FinishedPart]:
        found = (self._listed(number) for number in range(self.count))
        return [done for done in found if done is not None]

    def _listed(self, number: int) -> FinishedPart | None:
        """Return the record of a shard that is done, or ``None``."""
        path = self.path / _done_name(number)
        if not path.is_file():
            return None
        try:
            return decode(FinishedPart, read_json(path))
        except ValueError as error:
            raise DamagedFileError(path, f"an entry is wrong ({error})", "pass --force to begin anew") from None

    def _save(self, name: str, write: Callable[[Path], None]) -> None:
        """Let a file appear whole or not at all, even if the machine stops."""
        with tempfile.TemporaryDirectory(dir=self.path) as working:
            file = Path(working) / name
            write(file)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.replace(self.path / name)


def _entries(every: Iterable[FinishedPart]) -> tuple[ShardEntry, ...]:
    return tuple(done.entry for done in every if done.entry is not None)


def _asked(planned: ShardDirectory) -> tuple[object, ...]:
    """Return the parts of a plan that decide its shards."""
    return planned.fingerprint, planned.site, planned.settings, planned.edits, planned.made, planned.versions


def _done_name(number: int) -> str:
    return f"shard-{number:05d}.json"
