"""The only place that prints: results on stdout for people or as one JSON object, everything else on stderr.

Whatever is printed passes :func:`wisecli.edits.text.plain`. Rich, slow to import, is imported once it is needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, Literal

from wisecli.edits.text import is_plain, plain
from wisecli.progress import NOTE, Event, ProgressCallback

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table as RichTable

    from wisecli.edits.checks.admission import AdmissionReport

_LINE_SECONDS = 5.0
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Console:
    """How a command speaks: ``as_json`` prints one object and nothing else on stdout; ``quiet`` no progress."""

    as_json: bool = False
    quiet: bool = False

    @contextmanager
    def watching(self) -> Iterator[ProgressCallback]:
        """Show progress on stderr: bars on a terminal, a line at the end of a stage elsewhere, nothing if quiet."""
        if self.quiet:
            yield lambda _event: None
        elif sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            from rich.console import Console as RichConsole
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            errors = RichConsole(stderr=True)
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=errors) as bars:
                yield _Bars(bars)
        else:
            yield _Lines()

    def result(self, content: dict[str, Any], *lines: str | Table) -> None:
        """Print a result: the object as JSON, or what people read, lines and tables."""
        if self.as_json:
            text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
            sys.stdout.write(
                "".join(char if char == "\n" or is_plain(char) else json.dumps(char)[1:-1] for char in text) + "\n"
            )
            return
        from rich.console import Console as RichConsole
        from rich.text import Text

        out = RichConsole(highlight=False, soft_wrap=True)
        for line in lines:
            out.print(line.laid_out() if isinstance(line, Table) else Text(plain(line)))

    def warn(self, sentences: Sequence[str]) -> None:
        """Print what was passed over, on stderr, a line each; if quiet as well."""
        for sentence in sentences:
            sys.stderr.write(f"warning: {plain(sentence)}\n")


@dataclass
class Table:
    """Rows of texts, which may be a stranger's, below their columns' names; those in ``right`` are aligned there."""

    columns: Sequence[str]
    title: str = ""
    right: Collection[str] = ()
    headed: bool = True
    folded: bool = False
    rows: list[tuple[str, ...]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def part(self) -> None:
        """Draw a line below the rows so far."""
        self.sections.add(len(self.rows))

    def laid_out(self) -> RichTable:
        """Return the same table for Rich."""
        from rich.table import Table as RichTable
        from rich.text import Text

        found = RichTable(title=Text(plain(self.title)) if self.title else None, show_header=self.headed)
        for name in self.columns:
            justify: Literal["right", "left"] = "right" if name in self.right else "left"
            found.add_column(Text(plain(name)), justify=justify, overflow="fold" if self.folded else "ellipsis")
        for number, cells in enumerate(self.rows):
            if number in self.sections:
                found.add_section()
            found.add_row(*(Text(plain(cell)) for cell in cells))
        return found


def fail(message: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr, on one line of its own; before it what it sums up, a line each."""
    for detail in details if details[1:] else ():
        sys.stderr.write(f"{plain(detail)}\n")
    sys.stderr.write(f"error: {plain(message)}\n")


def show_all_letters() -> None:
    """Have letters that the terminal's encoding lacks spelled out, where Python would give up."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
            self._bars.console.print(plain(event.note), markup=False, highlight=False)
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, note="")
        total = event.total or None
        self._bars.update(self._tasks[event.stage], completed=event.done, total=total, note=plain(event.note))


class _Lines:
    """A line a stage, and one every few seconds in between."""

    def __init__(self) -> None:
        self._stage, self._started, self._shown_at = "", 0.0, 0.0

    def __call__(self, event: Event) -> None:
        if event.stage == NOTE:
            sys.stderr.write(f"{plain(event.note)}\n")
            return
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._started, self._shown_at = event.stage, now, now
            if not event.total:
                sys.stderr.write(f"{event.stage}\n")
        finished = event.done == event.total
        if not event.total or not (finished or now - self._shown_at >= _LINE_SECONDS):
            return
        self._shown_at = now
        left = (now - self._started) * (event.total - event.done) / max(event.done, 1)
        rest = "" if finished else f", about {left:.0f} s left"
        note = f": {plain(event.note)}" if event.note else ""
        sys.stderr.write(f"{event.stage} {event.done}/{event.total}{note}{rest}\n")


def would_write(what: str, report: Any) -> str:
    """Return what a dry run says of a report: its output, and the memory that the run would take."""
    peak = report.peak_rss_bytes / 1e6
    return f"would write {what} to {report.output}/, taking about {peak:.0f} MB of memory; nothing was written"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is one."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def sifted_lines(sifted: AdmissionReport) -> list[str]:
    """Return a line for every edit that was left out."""
    left_out = (*sifted.known, *sifted.dropped)
    return [f"left out: {edit.id} (line {edit.line}): {edit.reason}" for edit in left_out]


def sifted_json(sifted: AdmissionReport) -> dict[str, Any]:
    """Return what ``--json`` prints of edits that were left out."""
    return {
        "known": [asdict(known) for known in sifted.known],
        "dropped": [asdict(dropped) for dropped in sifted.dropped],
        "conflicts": list(sifted.conflicts),
    }
