"""The package's own ways to edit, as they take part in `wise bench`: by the commands that users give."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import jsonlines

from wisecli.bench.answer_files import AnswerFolder
from wisecli.bench.bench_context import BenchContext
from wisecli.bench.editing_run import MethodFolder
from wisecli.bench.methods.evaluation import overhead, target_predictions
from wisecli.bench.result_row import Peaks, ResultRow
from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.measure.evaluate import EvalReport, evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, MergeSettings, Mode, SiteName, resolve
from wisecli.edits.checks.admission import NO_CHECKS
from wisecli.environment import forget_peaks
from wisecli.errors import ChangedInputError, DamagedFileError, OutputExistsError
from wisecli.evaluation.answers import Books
from wisecli.evaluation.edited_model import attach
from wisecli.io.checkpoint import read_json, replace_json
from wisecli.io.json_schema import CLOSED, decode
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import encode
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress


@dataclass(frozen=True)
class WiseMethod:
    """One of our own ways to edit: the preset and the site of `wise edit`, and the mode of `wise merge`."""

    preset: Literal["default", "paper"] | None = None
    site: SiteName | None = None
    mode: Mode | None = None


WISE_METHODS = {
    "wise": WiseMethod(),
    "wise-retrieve": WiseMethod(site="matrix", mode="retrieve"),
    "wise-paper": WiseMethod(preset="paper"),
}


@dataclass(frozen=True)
class Spent:
    """What the first ``edits`` edits have cost so far; stored beside the shards, so that a continued run adds to it."""

    __pydantic_config__ = CLOSED

    edits: int
    seconds: float = 0.0
    peaks: Peaks = field(default_factory=Peaks)


def wise_rows(context: BenchContext, name: str, folder: MethodFolder, counts: Sequence[int]) -> Iterator[ResultRow]:
    """Yield a row for each number of edits of one of our ways; shards lie in its ``folder`` until all are measured."""
    memory = context.work / "memory"
    if counts and not folder.directory.exists():
        _learn(context, name)
    for count in counts:
        context.on_progress(Event(f"{name}, {count} edits"))
        forget_peaks()
        run = WiseRun(context, name, folder, count)
        spent = run.edited()
        begun = time.perf_counter()
        merge([run.shards], memory, MergeSettings(mode=WISE_METHODS[name].mode), force=True)
        seconds = spent.seconds + time.perf_counter() - begun
        report = _evaluated(context, memory, run.file, folder.answers(count))
        yield context.maker.row(
            name,
            count,
            after=report.figures,
            before=report.before,
            each=report.each,
            costs={
                "seconds_per_edit": seconds / count,
                "bytes": sum(path.stat().st_size for path in memory.iterdir()),
                "overhead": _overhead(context, memory, count),
                "extra_tokens": 0.0,
            },
            peaks=spent.peaks.and_now(),
        )


def _learn(context: BenchContext, name: str) -> None:
    """Let the commands fill their caches for the model, which is no edit's cost, by writing one edit."""
    context.on_progress(Event(f"{name}, what is learned of a model once"))
    folder = MethodFolder(context.work / f"{name}-learning")
    run = WiseRun(replace(context, on_progress=ignore_progress), name, folder, 1)
    run.edited()
    merge([run.shards], folder.directory / "memory", MergeSettings(mode=WISE_METHODS[name].mode))
    folder.remove()


def _evaluated(context: BenchContext, memory: Path, file: Path, answers: Path) -> EvalReport:
    """Evaluate a memory with the benchmark's settings; what the base model answered before is not asked again."""
    settings, what = context.settings, context.generated
    given = EvalSettings(
        protocol=what.protocol,
        forms=settings.forms,
        kinds=settings.kinds,
        ask=settings.ask,
        before=what.before,
        generate=settings.generate,
        batch_size=settings.batch_size,
    )
    known = Books(context.known.answers, AnswerFolder(answers))
    return evaluate(memory, given, data=file, load=context.load, known=known, on_progress=context.on_progress)


def _overhead(context: BenchContext, memory: Path, count: int) -> float:
    """Return how much longer one pass over prompts and answers takes with a memory."""
    edited = attach(memory, load=context.load)
    loaded = Loaded(edited.model, edited.tokenizer, edited.stream)
    rows = [encode(edited.tokenizer, *pair) for pair in context.timed(count)]

    def run() -> None:
        target_predictions(loaded, rows, batch_size=context.settings.batch_size)

    def unedited() -> None:
        with edited.unedited():
            run()

    return overhead(run, unedited)


class WiseRun:
    """`wise edit` with the first ``count`` edits, and what it takes."""

    def __init__(self, context: BenchContext, name: str, folder: MethodFolder, count: int) -> None:
        self.context, self.name, self.folder, self.count = context, name, folder, count
        self.file, self.shards = context.work / "edits.jsonl", folder.directory / "shards"
        self._kept = folder.directory / "spent.json"

    def edited(self) -> Spent:
        """Return what it took to write the shards, continuing a run that was interrupted and keeping a finished one."""
        spent = self._spent()
        if spent is not None and spent.edits == self.count:
            try:
                return self._run(spent)
            except (OutputExistsError, ChangedInputError):
                self.context.on_progress(Event(NOTE, note=f"{self.name} was broken off and begins anew"))
        self.folder.begin()
        return self._run(Spent(self.count))

    def _run(self, spent: Spent) -> Spent:
        """Run `wise edit`, keeping what it takes after each shard."""
        begun = time.perf_counter()

        def now() -> Spent:
            return Spent(spent.edits, spent.seconds + time.perf_counter() - begun, spent.peaks.and_now())

        def on_progress(event: Event) -> None:
            if event.stage == "shards":
                self._keep(now())
            self.context.on_progress(event)

        self._keep(spent)
        if self._edit(on_progress).up_to_date:
            return spent
        found = now()
        self._keep(found)
        return found

    def _edit(self, on_progress: ProgressCallback) -> EditReport:
        """Write the first ``count`` records to a file, and the shards of these edits."""
        with jsonlines.open(self.file, "w") as writer:
            writer.write_all(record.as_dict() for record in self.context.tested[: self.count])
        way = WISE_METHODS[self.name]
        given = {"preset": way.preset, "site": way.site, "seed": self.context.settings.seed}
        return edit(
            str(self.context.directory),
            self.file,
            self.shards,
            resolve(EditSettings, given, section="edit"),
            load=self.context.load,
            admission=NO_CHECKS,
            on_progress=on_progress,
        )

    def _keep(self, spent: Spent) -> None:
        replace_json(self._kept, asdict(spent))

    def _spent(self) -> Spent | None:
        """Return the stored costs, if they can be read."""
        try:
            return decode(Spent, read_json(self._kept))
        except (DamagedFileError, ValueError):
            return None
