"""Edits given to a method portion by portion, what it holds kept on disk, so that a run that is broken off goes on."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from wisecli.bench.methods.base import Gradual, Method, Resumable, UnsuitableError
from wisecli.bench.result_row import Peaks
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError, NotFiniteTensorError
from wisecli.io.checkpoint import load_tensors, open_tensors, save_tensors
from wisecli.io.json_schema import CLOSED, decode, parse
from wisecli.progress import Event, ProgressCallback

# So many seconds of editing are lost at most, or those of one portion.
_EVERY = 60.0


@dataclass(frozen=True)
class RunState:
    """How far a method has come: ``done`` of ``row`` edits, in so many ``seconds``, ``portion`` of them at a time.

    ``ends`` are the numbers of edits up to there after which it is measured: a portion ends at each of them. ``begun``
    is where the portion ends that it is in the middle of, 0 between portions. ``learnt`` tells the records that it may
    have learnt from.
    """

    __pydantic_config__ = CLOSED

    portion: int
    learnt: str = ""
    ends: tuple[int, ...] = ()
    row: int = 0
    done: int = 0
    begun: int = 0
    seconds: float = 0.0
    peaks: Peaks = field(default_factory=Peaks)

    @property
    def where(self) -> str:
        """The progress in words."""
        return f"in the middle of edits {self.done + 1} to {self.begun}" if self.begun else f"after {self.done} edits"


class MethodFolder:
    """A method's own directory, which is there as long as not all of its rows are measured."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.file = directory, directory / "state.safetensors"

    def keep(self, run_state: RunState, tensors: dict[str, Tensor]) -> None:
        """Replace the stored state, whole or not at all; a state with numbers that are not finite is skipped."""
        working = self.file.with_suffix(".tmp")
        with suppress(NotFiniteTensorError):
            save_tensors(working, tensors, {"standing": json.dumps(asdict(run_state))})
            with working.open("rb") as stream:
                os.fsync(stream.fileno())
            working.replace(self.file)

    def kept(self) -> tuple[RunState, dict[str, Tensor]] | None:
        """Return the stored state, if it can be read."""
        try:
            with open_tensors(self.file) as stream:
                run_state = decode(RunState, parse((stream.metadata() or {}).get("standing", "")))
            return run_state, load_tensors(self.file)
        except (DamagedFileError, ValueError):
            return None

    def answers(self, count: int) -> Path:
        """Return where answers after ``count`` edits are kept."""
        return self.directory / f"answers-{count}"

    def begin(self) -> None:
        """Empty the directory; that it exists says that the method has begun."""
        self.remove()
        self.directory.mkdir(parents=True)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.directory, ignore_errors=True)


class PortionProgress:
    """Passes events on, with a portion's own count turned into that of all edits: 3 of 10 into 53 of 100."""

    def __init__(self, on_progress: ProgressCallback) -> None:
        self.on_progress, self.before, self.portion, self.whole = on_progress, 0, 0, 0

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        if self.portion and event.total == self.portion:
            event = replace(event, done=self.before + event.done, total=self.whole)
        self.on_progress(event)


class EditingRun:
    """One method on its way through a stream of edits, to each of some numbers of them.

    Args:
        counts: the numbers of edits at which it stops, in rising order.
        learnt: what tells the records that the method may learn from.
    """

    def __init__(
        self,
        method: Method,
        edits: Sequence[Edit],
        counts: Sequence[int],
        folder: MethodFolder,
        on_progress: PortionProgress,
        *,
        learnt: str = "",
    ) -> None:
        self.method, self.edits, self.counts, self.folder, self.on_progress = method, edits, counts, folder, on_progress
        self.state = RunState(method.portion if isinstance(method, Resumable) else 0, learnt)
        self._kept = time.perf_counter()

    def take_up(self, most: int) -> bool:
        """Continue an interrupted run; return whether that was possible.

        It cannot if the numbers of edits, or the records that a method may learn from, are others up to there, or if
        more than ``most`` edits were given already.
        """
        if not isinstance(self.method, Resumable) or (kept := self.folder.kept()) is None:
            return False
        run_state, tensors = kept
        ends = tuple(count for count in self.counts if count <= run_state.done)
        own = self.state.portion, self.state.learnt, ends
        if (run_state.portion, run_state.learnt, run_state.ends) != own or run_state.done > most:
            return False
        if run_state.begun and run_state.begun != self._end(run_state.done, run_state.done):
            return False
        self.method.restore(tensors, list(self._portions(0, run_state.done)))
        self.state = run_state
        return True

    def edit_to(self, count: int) -> None:
        """Give the method its edits up to a number of them."""
        run_state = self.state
        peaks = run_state.peaks if run_state.row == count else Peaks()
        self.state = replace(run_state, row=count, peaks=peaks)
        self._kept = time.perf_counter()
        if run_state.done < count:  # answers are of the edits that were given then
            shutil.rmtree(self.folder.answers(count), ignore_errors=True)
        progress = self.on_progress
        for part in self._portions(run_state.done, count):
            progress.before, progress.portion, progress.whole = self.state.done, len(part), count
            self._edit(part)
        progress.portion = 0

    def _edit(self, part: Sequence[Edit]) -> None:
        """Edit a portion and record how far it got; store the state now and then and at the row's end."""
        end, begun = self.state.done + len(part), time.perf_counter()
        if isinstance(self.method, Gradual):
            for _ in self.method.steps(part):
                self._advance(self.state.done, time.perf_counter() - begun, end)
                self._keep_in_time()
                begun = time.perf_counter()
        else:
            self.method.edit(part)
        self._advance(end, time.perf_counter() - begun)
        self._keep_in_time(now=end == self.state.row)

    def _portions(self, done: int, count: int) -> Iterator[list[Edit]]:
        """Yield edits ``done`` to ``count`` in portions, of which one ends at each of the run's counts."""
        while done < count:
            end = self._end(done, count)
            yield [_plainly(edit) for edit in self.edits[done:end]]
            done = end

    def _end(self, done: int, count: int) -> int:
        """Return where the portion ends that begins after ``done`` edits, on the way to ``count``."""
        end = min((step for step in (*self.counts, count) if step > done), default=done)
        return min(end, done + (self.state.portion or end))

    def _advance(self, done: int, seconds: float, begun: int = 0) -> None:
        """Record how many edits are done, and the seconds and peak memory that it took."""
        self.state = replace(
            self.state,
            done=done,
            begun=begun,
            ends=tuple(count for count in self.counts if count <= done),
            seconds=self.state.seconds + seconds,
            peaks=self.state.peaks.and_now(),
        )

    def _keep_in_time(self, *, now: bool = False) -> None:
        """Store what the method holds, if the last time is long ago or ``now`` asks for it."""
        if isinstance(self.method, Resumable) and (now or time.perf_counter() - self._kept >= _EVERY):
            self.folder.keep(self.state, self.method.state())
            self._kept = time.perf_counter()


def _plainly(edit: Edit) -> Edit:
    """Return an edit as the papers state one: a prompt and its target.

    Raises:
        UnsuitableError: an answer is to be erased, and nothing to take its place.
    """
    if edit.erased:
        raise UnsuitableError("it has no way to erase an answer; give every such edit a `replacement`")
    return edit if edit.replacement is None else replace(edit, op="modify", target=edit.answer, replacement=None)
