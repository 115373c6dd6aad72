"""``wise rollback``: a memory as it was at an earlier release, as a release of its own."""

import time
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from pathlib import Path

from wisecli.errors import SettingsError
from wisecli.memory.history.open_memory import OpenMemory, settings_of
from wisecli.memory.history.release_log import Change, Provenance, Release, changing
from wisecli.memory.history.releases import publish
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress


@dataclass(frozen=True)
class RollbackReport:
    """The release that was gone back to, and the one that came of it; whether its tensors are the same to the byte."""

    memory: Path
    target: Release
    release: Release
    held: int
    same: bool
    seconds: float


def rollback(
    memory: Path,
    to: str,
    *,
    model: str | None = None,
    provenance: Provenance = Provenance(),
    on_progress: ProgressCallback = ignore_progress,
) -> RollbackReport:
    """Join the shards of an earlier release anew. Nothing is lost: the releases since stay in the history.

    Args:
        to: number of a release, or a date or time (UTC unless it says otherwise); the newest release until then is
            meant, a date's own day included.

    Raises:
        SettingsError: there was no release then.
        WiseError: the memory cannot be used; it is as it was.
    """
    started = time.perf_counter()
    with changing(memory):
        opened = OpenMemory(memory)
        opened.require_whole_history()
        target = find_release(opened, to)
        before, after = ([edit.id for edit in opened.edits(release)] for release in (opened.releases[-1], target))
        change = Change(
            "rollback",
            target.shards,
            added=tuple(name for name in after if name not in before),
            removed=tuple(name for name in before if name not in after),
            provenance=replace(provenance, reason=provenance.reason or f"to release {target.number}"),
        )
        # The newest release may be what is to be made good.
        published = publish(
            opened, change, settings_of(target), new={}, anew=True, model=model, on_progress=on_progress
        )
    same = published.release.memory == target.memory
    if not same:
        on_progress(Event(NOTE, note="the tensors are not those of then to the byte: other versions made them"))
    seconds = time.perf_counter() - started
    return RollbackReport(memory, target, published.release, published.held, same, seconds)


def find_release(memory: OpenMemory, wanted: str) -> Release:
    """Return the release of a number, or the newest one until a date or time.

    Raises:
        SettingsError: there is none.
    """
    releases = memory.releases
    if wanted.isdecimal():
        found = [release for release in releases if release.number == int(wanted)]
    else:
        found = [release for release in releases if _until(wanted, release.at)]
    if not found:
        first, last = releases[0], releases[-1]
        raise SettingsError(
            f"{memory.path} has no release {wanted!r}: its releases are 1 to {last.number}, "
            f"from {first.when} to {last.when}"
        )
    return found[-1]


def _until(wanted: str, when: datetime) -> bool:
    """Return whether a time is not after the date or time that ``--to`` names, in UTC unless it says otherwise."""
    try:
        if len(wanted) == len("2026-11-01"):
            return when.astimezone(timezone.utc).date() <= date.fromisoformat(wanted)
        limit = datetime.fromisoformat(wanted)
    except ValueError:
        raise SettingsError(f"--to must be the number of a release, or a date as 2026-11-01, not {wanted!r}") from None
    return when <= (limit if limit.tzinfo else limit.replace(tzinfo=timezone.utc))
