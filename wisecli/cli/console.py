"""The only place that prints: results on stdout for people or as one JSON object, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from wisecli.progress import NOTE, Event, Watcher

if TYPE_CHECKING:
    from wisecli.edits.admission import Sifted

_LINE_SECONDS = 5.0
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Console:
    """How a command speaks: ``as_json`` prints one object and nothing else on stdout; ``quiet`` no progress."""

    as_json: bool = False
    quiet: bool = False

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Progress on stderr: bars on a terminal, a line at the end of a stage elsewhere, nothing if quiet."""
        errors = RichConsole(stderr=True)
        if self.quiet:
            yield lambda _event: None
        elif errors.is_terminal and "NO_COLOR" not in os.environ:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=errors) as bars:
                yield _Bars(bars)
        else:
            yield _Lines()

    def result(self, content: dict[str, Any], *renderables: Any) -> None:
        """Print a result: the object as JSON, or what people read."""
        if self.as_json:
            sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
            return
        out = RichConsole(highlight=False, soft_wrap=True)
        for item in renderables:
            out.print(item)


def fail(message: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr, on one line of its own; before it what it sums up, a line each."""
    for one in details if details[1:] else ():
        sys.stderr.write(f"{plain(one)}\n")
    sys.stderr.write(f"error: {plain(message)}\n")


def note(message: str) -> None:
    """Say something on stderr that is neither a result nor an error."""
    sys.stderr.write(f"{plain(message)}\n")


def quiet_libraries() -> None:
    """Keep what libraries say on their own out of the program's output; takes effect when they are imported."""
    warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


class _Bars:
    """One bar a stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if event.stage == NOTE:
            self._bars.console.print(Text(event.note))
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, note="")
        total = event.total or None
        self._bars.update(self._tasks[event.stage], completed=event.done, total=total, note=event.note)


class _Lines:
    """A line a stage, and one every few seconds in between."""

    def __init__(self) -> None:
        self._stage, self._started, self._told = "", 0.0, 0.0

    def __call__(self, event: Event) -> None:
        if event.stage == NOTE:
            sys.stderr.write(f"{event.note}\n")
            return
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._started, self._told = event.stage, now, now
            if not event.total:
                sys.stderr.write(f"{event.stage}\n")
        finished = event.done == event.total
        if not event.total or not (finished or now - self._told >= _LINE_SECONDS):
            return
        self._told = now
        left = (now - self._started) * (event.total - event.done) / max(event.done, 1)
        rest = "" if finished else f", about {left:.0f} s left"
        note = f": {event.note}" if event.note else ""
        sys.stderr.write(f"{event.stage} {event.done}/{event.total}{note}{rest}\n")


def plain(text: str) -> Text:
    """Text of a stranger, with whatever would steer a terminal spelt out."""
    return Text("".join(one if one.isprintable() else repr(one)[1:-1] for one in text))


def would_write(what: str, report: Any) -> Text:
    """What a dry run says, of a report that has an output and the memory that the run would take."""
    peak = report.peak_rss_bytes / 1e6
    return Text(f"would write {what} to {report.output}/, taking about {peak:.0f} MB of memory; nothing was written")


def count(number: int, noun: str) -> str:
    """A number and what it is of, in the plural unless it is one."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def sifted_lines(sifted: Sifted) -> list[str]:
    """A line for every edit that was left out."""
    left_out = (*sifted.known, *sifted.dropped)
    return [f"left out: {one.id} (line {one.line}): {one.reason}" for one in left_out]


def sifted_json(sifted: Sifted) -> dict[str, Any]:
    """What ``--json`` prints of it."""
    return {
        "known": [asdict(one) for one in sifted.known],
        "dropped": [asdict(one) for one in sifted.dropped],
        "conflicts": list(sifted.told),
    }
