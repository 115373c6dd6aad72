"""A memory's life: its shards, and a log of all that was done to it, each line chained to the one before by digest.

Beside ``router.json`` and the memory's tensors, which are its newest release, a memory that is edited again and again
has a directory ``history``: ``shards/0001`` and on, as ``wise edit`` wrote them, and ``log.jsonl``. Nothing is ever
taken out of either, so that every release can be made anew.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import jsonlines
from filelock import FileLock, Timeout

from wisecli.artifacts import names
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, Manifest
from wisecli.errors import BusyError, DamagedFileError, MemoryHistoryError
from wisecli.io.atomic_output import link_or_copy, whole_directory
from wisecli.io.digest import sha256_file, sha256_text
from wisecli.io.json_schema import OPEN, decode
from wisecli.io.safe_paths import inside

HISTORY, LOG, SHARDS = names.HISTORY, "log.jsonl", "shards"
Action = Literal["edit", "merge", "remove", "rollback"]


@dataclass(frozen=True)
class Release:
    """One line of the log: what was done, by whom, and the memory that came of it.

    ``shards`` are the directories that the memory is merged from, each with the ids of its edits that do not count;
    ``superseded`` maps ids of edits that gave way to the id that took their place; ``memory`` is the sha256 of the
    tensors, ``edits_file`` that of the file of edits, ``previous`` that of the line before, without its end.
    """

    __pydantic_config__ = OPEN

    number: int
    when: str
    who: str
    action: Action
    added: tuple[str, ...]
    removed: tuple[str, ...]
    superseded: dict[str, str]
    shards: dict[str, tuple[str, ...]]
    merge: dict[str, Any]
    memory: str
    previous: str
    edits_file: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def at(self) -> datetime:
        """When it was made."""
        return datetime.fromisoformat(self.when)


@dataclass(frozen=True)
class Provenance:
    """By whom a memory is changed, and why; by default by the user of this process."""

    who: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """What is to be written into the log, besides what every line has."""

    action: Action
    shards: Mapping[str, tuple[str, ...]]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    superseded: Mapping[str, str] = field(default_factory=dict)
    edits_file: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = Provenance()


def has_history(memory: Path) -> bool:
    """Whether a directory is a memory that is edited again and again."""
    return (memory / HISTORY / LOG).is_file()


def read_history(memory: Path) -> list[Release]:
    """All releases, the oldest first; every line's digest is checked against the line after it.

    Raises:
        MemoryHistoryError: the memory has no history.
        DamagedFileError: a line was altered, or taken out.
    """
    path = memory / HISTORY / LOG
    if not path.is_file():
        raise MemoryHistoryError(memory)
    found: list[Release] = []
    previous = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            release = decode(Release, json.loads(line))
            release.at  # noqa: B018 (a date that is none is found here)
        except (ValueError, TypeError) as error:
            raise DamagedFileError(path, f"line {number} is wrong ({error})", "restore it from a copy") from None
        if release.previous != previous or release.number != number:
            raise DamagedFileError(path, f"line {number} does not follow the one before", "restore it from a copy")
        previous = sha256_text(line)
        found.append(release)
    if not found:
        raise DamagedFileError(path, "it is empty", "restore it from a copy")
    return found


def shard_path(memory: Path, name: str) -> Path:
    """Where a directory of shards of a memory's history is."""
    return inside(memory / HISTORY, f"{SHARDS}/{name}")


def next_name(memory: Path) -> str:
    """A name for the next directory of shards."""
    directory = memory / HISTORY / SHARDS
    taken = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()] if directory.is_dir() else []
    return f"{max(taken, default=0) + 1:04d}"


def inputs_of(memory: Path, release: Release) -> dict[Path, tuple[str, ...]]:
    """The directories that a release is merged from, each with the ids of its edits that do not count."""
    return {shard_path(memory, name): gone for name, gone in release.shards.items()}


@contextmanager
def changing(memory: Path) -> Iterator[None]:
    """Keep other processes from changing a memory; the lock dies with its owner.

    Raises:
        BusyError: another one is at it.
    """
    memory.absolute().parent.mkdir(parents=True, exist_ok=True)
    path = memory.absolute().parent / f".{memory.name}.lock"
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(memory) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody takes a lock on a file that is gone
        lock.release()


@contextmanager
def next_release(memory: Path) -> Iterator[Path]:
    """A working directory with the memory's history in it, which takes the memory's place when the block ends well."""
    with whole_directory(memory, force=True) as working:
        if (memory / HISTORY).is_dir():
            shutil.copytree(memory / HISTORY, working / HISTORY, copy_function=link_or_copy)
            # A linked log would change in the old release, too, if this one came to nothing.
            shutil.copyfile(memory / HISTORY / LOG, working / f".{LOG}")
            (working / f".{LOG}").replace(working / HISTORY / LOG)
        (working / HISTORY / SHARDS).mkdir(parents=True, exist_ok=True)
        yield working


def record(working: Path, manifest: Manifest, change: Change, *, file: str) -> Release:
    """Write one more line into the log of a release that is being made.

    Args:
        file: name of the memory's tensors.
    """
    path = working / HISTORY / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    release = Release(
        len(lines) + 1,
        datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        change.provenance.who or _user(),
        change.action,
        change.added,
        change.removed,
        dict(change.superseded),
        dict(change.shards),
        {name: value for name, value in manifest.merge.items() if name != "shards"},
        sha256_file(working / file),
        sha256_text(lines[-1]) if lines else "",
        dict(change.edits_file),
        change.provenance.reason,
    )
    with jsonlines.open(path, "a") as writer:
        writer.write(asdict(release))
    return release


def require_newest(memory: Path, releases: list[Release], file: str) -> None:
    """Check that a memory's tensors are those of its newest release.

    Raises:
        DamagedFileError: they are others.
    """
    if sha256_file(inside(memory, file)) != releases[-1].memory:
        raise DamagedFileError(
            memory / MANIFEST_NAME, "the memory is not the newest release of its log", "roll back to a release"
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
