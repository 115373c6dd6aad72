"""The rows of each method of `wise bench`: of the package's own commands, and of methods behind the protocol."""

from collections.abc import Iterator, Sequence

import torch

from wisecli.bench.answer_files import AnswerFolder
from wisecli.bench.bench_context import BenchContext
from wisecli.bench.editing_run import EditingRun, MethodFolder
from wisecli.bench.methods.base import AT_ONCE, METHODS, UnsuitableError
from wisecli.bench.methods.evaluation import MethodSubject
from wisecli.bench.result_row import ResultRow
from wisecli.bench.wise_methods import WISE_METHODS, wise_rows
from wisecli.environment import forget_peaks
from wisecli.evaluation.metrics import Measuring
from wisecli.evaluation.protocols import measure_generated
from wisecli.progress import NOTE, Event


def rows_of(context: BenchContext, name: str, counts: Sequence[int], missing: Sequence[int]) -> Iterator[ResultRow]:
    """Yield a row for each number of edits of one method that is ``missing``; or the reason why it cannot run.

    Args:
        counts: all numbers of edits: what a method is given at once ends at each, also where a row is there.
    """
    folder = MethodFolder(context.work / name)
    if name in WISE_METHODS:
        yield from wise_rows(context, name, folder, missing)
    elif name in AT_ONCE:
        for count in missing:
            yield from _baseline_rows(context, name, MethodFolder(folder.directory / str(count)), [count], [count])
    elif missing:
        yield from _baseline_rows(context, name, folder, [count for count in counts if count <= missing[-1]], missing)
    folder.remove()


def _baseline_rows(
    context: BenchContext, name: str, folder: MethodFolder, counts: Sequence[int], missing: Sequence[int]
) -> Iterator[ResultRow]:
    """Yield a rival's results after each of the missing numbers of edits; it makes the other edits, too."""
    run = None
    for count in counts:
        context.on_progress(Event(f"{name}, {count} edits"))
        forget_peaks()
        try:
            run = run or _begun(context, name, folder, counts, missing[0])
            run.edit_to(count)
            if count in missing:
                yield _measured(context, name, run, count)
        except UnsuitableError as error:
            if count in missing:
                yield {"method": name, "edits": count, "figures": {"cannot": str(error)}}


def _begun(context: BenchContext, name: str, folder: MethodFolder, counts: Sequence[int], most: int) -> EditingRun:
    """Return a method that continues where it was interrupted, or starts."""
    method = METHODS[name](context.bench)
    run = EditingRun(method, context.tested, counts, folder, context.portion_watcher, learnt=context.learnt_digest)
    if run.take_up(most):
        context.on_progress(Event(NOTE, note=f"{name} goes on {run.state.where}"))
        return run
    if folder.directory.exists():
        context.on_progress(Event(NOTE, note=f"{name} was broken off and begins anew"))
    folder.begin()
    return run


def _measured(context: BenchContext, name: str, run: EditingRun, count: int) -> ResultRow:
    """Return the figures and costs of a method after its first ``count`` edits."""
    size, edits = context.settings.batch_size, context.tested[:count]
    what, timed = context.generated, context.timed(count)
    answers, loaded = AnswerFolder(run.folder.answers(count)), context.bench.loaded
    subject = MethodSubject(
        loaded, run.method, context.known, batch_size=size, answers=answers, on_progress=context.on_progress
    )
    measuring = Measuring(subject, edits, generate=context.settings.generate and not what.by_wild)
    with torch.random.fork_rng(devices=[]):
        length = measuring.answer_length()
        generated, _ = measure_generated(subject, what, edits, edits, max_new_tokens=length)
        measuring.run()
    return context.maker.row(
        name,
        count,
        after={**generated.figures, **measuring.after},
        before={**generated.before, **measuring.before},
        each={**generated.each, **measuring.each},
        costs={
            "seconds_per_edit": run.state.seconds / count,
            "bytes": run.method.bytes(),
            "overhead": subject.overhead(timed),
            "extra_tokens": subject.extra_tokens([prompt for prompt, _ in timed]),
        },
        peaks=run.state.peaks.and_now(),
    )
