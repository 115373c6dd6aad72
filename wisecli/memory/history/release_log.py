"""The history of a memory: its shards, and a log of its releases in which each line holds the digest of the one before.

Beside ``router.json`` and the memory's tensors, which are its newest release, a memory has a directory ``history``:
``shards/0001`` and on, as ``wise edit`` wrote them, and ``log.jsonl``. Nothing is ever taken out of either, so that
every release can be made anew.
"""

import getpass
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import jsonlines

from wisecli.artifacts import file_names
from wisecli.artifacts.checksums import require_checksums
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, MEMORY_NAME, Manifest, MemoryManifest, read_manifest
from wisecli.edits.checks.signatures import SigningKey
from wisecli.errors import BusyError, DamagedFileError, MemoryHistoryError, WiseError, WrongDirectoryError
from wisecli.io.atomic_output import link_or_copy, tidy, whole_directory, writing
from wisecli.io.digest import sha256_file, sha256_text
from wisecli.io.json_schema import OPEN, decode
from wisecli.io.locks import lock_file
from wisecli.io.safe_paths import inside, require_regular

HISTORY, LOG, SHARDS = file_names.HISTORY, "log.jsonl", "shards"
# How surely prompts mean the edits of the newest release, so that the next one need not find it again.
PROBS_NAME = "probabilities.safetensors"
_NOT_NEWEST = "its sha256 differs, so that the memory is not the newest release of its log"
Action = Literal["edit", "merge", "remove", "rollback"]


@dataclass(frozen=True)
class Release:
    """One line of the log: what was done, by whom, and the digests of the memory that resulted.

    ``shards`` are the directories that the memory is merged from, each with the ids of its edits that do not count;
    ``superseded`` maps ids of edits that gave way to the id that took their place; ``modified`` are those of ``added``
    that took the place of an edit with their own id. ``memory`` is the sha256 of the tensors, ``manifest`` that of
    ``router.json``, which older versions did not keep, ``edits_file`` that of the file of edits, ``previous`` that of
    the line before, without its end.
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
    modified: tuple[str, ...] = ()
    manifest: str = ""

    @property
    def at(self) -> datetime:
        """When it was made."""
        return datetime.fromisoformat(self.when)


@dataclass(frozen=True)
class Provenance:
    """Who changes a memory, by default the user of this process, and why. ``key`` signs the release."""

    who: str | None = None
    reason: str = ""
    key: SigningKey | None = None


@dataclass(frozen=True)
class Change:
    """The part of a log line that only this change has.

    ``replaced`` maps ids of edits that give way to the id that takes their place, which may be the same.
    """

    action: Action
    shards: Mapping[str, tuple[str, ...]]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    edits_file: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = Provenance()


def has_history(memory: Path) -> bool:
    """Return whether a directory is a memory with a history."""
    return (memory / HISTORY / LOG).is_file()


def read_history(memory: Path) -> list[Release]:
    """Return all releases, the oldest first, and check every line's digest against the line after it.

    Raises:
        MemoryHistoryError: the memory has no history.
        DamagedFileError: a line was altered, or taken out; or this is no memory.
    """
    path = memory / HISTORY / LOG
    if not path.is_file():
        raise _no_history(memory)
    found: list[Release] = []
    previous = ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"it is no text ({error})", "restore it from a copy") from None
    for number, line in enumerate(lines, start=1):
        try:
            release = decode(Release, json.loads(line))
            release.at  # noqa: B018 (a date that is none is found here)
        except (ValueError, TypeError) as error:
            raise DamagedFileError(path, f"line {number} is wrong ({error})", "restore it from a copy") from None
        if release.previous != previous or release.number != number:
            raise DamagedFileError(path, f"line {number} does not follow the one before", "restore it from a copy")
        previous = sha256_text(line)
        found.append(_modified_apart(release))
    if not found:
        raise DamagedFileError(path, "it is empty", "restore it from a copy")
    return found


def _no_history(memory: Path) -> WiseError:
    """Return why there is no history: the memory has none, or is none."""
    if file_names.kind_at(memory) == "memory":
        return MemoryHistoryError(memory)
    return WrongDirectoryError(memory, file_names.what_is_at(memory), "a memory that `wise merge` wrote")


def _modified_apart(release: Release) -> Release:
    """Return a release without its modified edits among the superseded ones, where older versions counted them."""
    modified = tuple(old for old, new in release.superseded.items() if old == new)
    superseded = {old: new for old, new in release.superseded.items() if old != new}
    return replace(release, modified=(*release.modified, *modified), superseded=superseded)


def is_merged(memory: Path) -> bool:
    """Return whether a memory has had one merge and nothing else, so that the same merge would make it anew."""
    if not (memory / HISTORY).exists():
        return True
    try:
        releases = read_history(memory)
    except WiseError:
        return False
    return len(releases) == 1 and releases[0].action == "merge"


def shard_path(memory: Path, name: str) -> Path:
    """Return the path of a directory of shards in a memory's history."""
    return inside(memory / HISTORY, f"{SHARDS}/{name}")


def anew_prefix(memory: Path) -> str:
    """Return the first part of the names of directories in which shards of a memory are trained anew."""
    return f".{memory.name}.anew-"


@contextmanager
def changing(memory: Path) -> Iterator[None]:
    """Return a context in which no other process changes a memory; what killed processes left is removed.

    Raises:
        BusyError: another one is at it.
        UnwritableError: nothing may be written there.
    """
    parent = memory.absolute().parent
    with ExitStack() as stack:
        with writing(memory):
            parent.mkdir(parents=True, exist_ok=True)
            mine = stack.enter_context(lock_file(parent / f".{memory.name}.lock"))
        if not mine:
            raise BusyError(memory)
        tidy(memory)
        for left in parent.glob(f"{glob.escape(anew_prefix(memory))}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def next_release(memory: Path, *, afresh: bool = False) -> Iterator[Path]:
    """Return a context with a working copy of a memory's history, which replaces the memory when the block ends well.

    Args:
        afresh: whether a history begins here, whatever there was.
    """
    with whole_directory(memory, force=True) as working:
        if not afresh and (memory / HISTORY).is_dir():
            shutil.copytree(memory / HISTORY, working / HISTORY, copy_function=link_or_copy)
            # A linked log would change in the old release, too, if this one came to nothing.
            shutil.copyfile(memory / HISTORY / LOG, working / f".{LOG}")
            (working / f".{LOG}").replace(working / HISTORY / LOG)
        (working / HISTORY / SHARDS).mkdir(parents=True, exist_ok=True)
        yield working


def record(working: Path, manifest: Manifest, change: Change, *, digest: str) -> Release:
    """Append a line to the log of a release that is being made.

    Args:
        digest: of the file of the memory's tensors.
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
        {old: new for old, new in change.replaced.items() if old != new},
        dict(change.shards),
        {name: value for name, value in manifest.merge.items() if name != "shards"},
        digest,
        sha256_text(lines[-1]) if lines else "",
        dict(change.edits_file),
        change.provenance.reason,
        tuple(old for old, new in change.replaced.items() if old == new),
        sha256_file(working / MANIFEST_NAME),
    )
    with jsonlines.open(path, "a") as writer:
        writer.write(asdict(release))
    return release


def require_whole(memory: Path, releases: Sequence[Release]) -> MemoryManifest:
    """Return the manifest of a memory, which with its tensors is its newest release, and of which no file was altered.

    Raises:
        DamagedFileError: naming what is otherwise.
    """
    newest, path = releases[-1], memory / MANIFEST_NAME
    if newest.manifest and _digest(path) != newest.manifest:
        raise DamagedFileError(path, _NOT_NEWEST, "roll back to a release")
    manifest = read_manifest(memory)
    file = manifest.memory.file
    path = inside(memory, file)
    with ThreadPoolExecutor(2) as pool:  # the largest file, beside all others
        digest, expected = pool.submit(_digest, path), has_full_digests(releases)
        others = pool.submit(require_checksums, memory, expected=expected, known={file: newest.memory})
    if digest.result() != newest.memory:
        raise DamagedFileError(path, _NOT_NEWEST, "roll back to a release")
    others.result()
    return manifest


def require_whole_history(memory: Path, releases: Sequence[Release]) -> None:
    """Check that no file of a memory was altered except its manifest and tensors, which can be made anew.

    Raises:
        DamagedFileError: naming those that were.
    """
    require_checksums(
        memory, expected=has_full_digests(releases), but=(MANIFEST_NAME, MEMORY_NAME, f"{HISTORY}/{PROBS_NAME}")
    )


def has_full_digests(releases: Sequence[Release]) -> bool:
    """Return whether the newest release has a digest of every file, which older versions did not write."""
    return bool(releases[-1].manifest)


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    require_regular(path)
    return sha256_file(path)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
