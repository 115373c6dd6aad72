"""``wise edit --watch``: a file of edits that grows, each batch of new lines into the same memory."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from wisecli.commands.edit.edit_into import Batch, IntoMemory, IntoReport, edit_into
from wisecli.config import EditSettings, resolve
from wisecli.editing.run.base_model import Base
from wisecli.editing.run.job import Job
from wisecli.edits.record import Edit, parse_line
from wisecli.errors import BusyError, EditFileError
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import has_history
from wisecli.progress import Event, ProgressCallback, ignore_progress


def follow(
    into: IntoMemory,
    path: Path,
    *,
    interval: float = 1.0,
    goes_on: Callable[[], bool] = lambda: True,
    on_progress: ProgressCallback = ignore_progress,
) -> Iterator[IntoReport]:
    """Edit whatever lines a file has that the memory has not taken in yet, and then those that are added to it.

    The model is loaded once. A line counts once its end is written. Lines that an earlier run took in are passed over.

    Args:
        into: by default the later one of two lines in conflict counts, as if they had come one after the other.
        interval: seconds between two looks at the file.
        goes_on: asked before each look.

    Raises:
        EditFileError: naming the line, if a record cannot be used; what came before it has landed.
    """
    if not into.admission.on_conflict:
        into = replace(into, admission=replace(into.admission, on_conflict="latest"))
    settings = resolve(EditSettings, into.flags, section="edit")
    base = Base(Job(model=into.model, settings=settings, edits=(), load=replace(into.load, revision=None)), on_progress)
    taken, lines = set(_edits_taken_in(into.memory)), _Lines(path)

    def landing(batch: Batch) -> IntoReport | None:
        while True:
            try:
                return edit_into(into, batch, loaded=base.loaded, on_progress=on_progress)
            except BusyError:  # somebody else changes the memory; what came through the file still lands
                if not goes_on():
                    return None
                on_progress(Event("waiting", note=f"for who is changing {into.memory.name}"))
                time.sleep(interval)

    while goes_on():
        for batch in _batches(lines.more(), path, taken):
            landed = landing(batch)
            if landed is None:
                return
            yield landed
            taken.update(edit for _, edit in batch.numbered)
        on_progress(Event("waiting", note=f"for lines of {path.name}"))
        time.sleep(interval)


class _Lines:
    """A file's lines, each given out once; a file that has become shorter is another one, and read from its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.number = path, 0, 0

    def more(self) -> list[tuple[int, bytes]]:
        """Return whole lines that were added, with their numbers."""
        if not self.path.is_file():
            return []
        if self.path.stat().st_size < self.offset:
            self.offset, self.number = 0, 0
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            whole, end, _ = stream.read().rpartition(b"\n")
        if not end:
            return []
        self.offset += len(whole) + 1
        found = list(enumerate(whole.split(b"\n"), start=self.number + 1))
        self.number += len(found)
        return found


def _batches(lines: Sequence[tuple[int, bytes]], path: Path, taken: Set[Edit]) -> Iterator[Batch]:
    """Yield edits that land together: all that are new, up to a line that cannot be used or an id that comes again.

    Raises:
        EditFileError: naming a line that cannot be used, once what came before it has landed.
    """
    found: dict[str, tuple[int, Edit]] = {}
    failed: EditFileError | None = None
    for number, line in lines:
        try:
            edits = parse_line(path, number, line) if line.strip() else ()
        except EditFileError as error:
            failed = error
            break
        fresh = [edit for edit in edits if edit not in taken]
        if any(edit.id in found for edit in fresh):
            yield _batch(path, found)
            found = {}
        found.update((edit.id, (number, edit)) for edit in fresh)
    if found:
        yield _batch(path, found)
    if failed is not None:
        raise failed


def _batch(path: Path, found: Mapping[str, tuple[int, Edit]]) -> Batch:
    numbered = tuple(found.values())
    return Batch(numbered, {"name": path.name, "lines": f"{numbered[0][0]}-{numbered[-1][0]}"})


def _edits_taken_in(memory: Path) -> Iterator[Edit]:
    """Yield every edit that any release has brought."""
    if has_history(memory):
        opened = OpenMemory(memory)
        for release in opened.releases:
            for directory in opened.directories(release):
                yield from directory.edits
