"""A job's edits → shards, with the model."""

import time
from dataclasses import replace
from pathlib import Path

from wisecli.artifacts.background_stats import load_background
from wisecli.artifacts.shard_manifest import UNRELATED_NAME, ShardDirectory, ShardEntry, read_shard_directory
from wisecli.commands.edit.edit_report import EditReport, untaken
from wisecli.commands.edit.planning import free_site, nothing_to_do, output_of, own_parts, planned, warn_of_unnamed
from wisecli.commands.edit.run_options import RunOptions
from wisecli.editing.run.base_model import Base
from wisecli.editing.run.executors import executor_for
from wisecli.editing.run.job import Job
from wisecli.editing.run.shard_differences import differences, up_to_date_shards
from wisecli.editing.run.staging import StagedShards
from wisecli.editing.run.worker import Worker
from wisecli.edits.checks.admission import Admitted
from wisecli.environment import peak_rss_bytes
from wisecli.errors import BusyError, ChangedInputError, GateFailedError, NothingTookError, StoppedError
from wisecli.models.loading import Loaded
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress


def write(
    base: Base, admitted: Admitted, edits_file: Path, output: Path, options: RunOptions, *, skip_known: bool
) -> EditReport:
    """Write admitted edits of a file; everything else as in :func:`wisecli.commands.edit.edit.edit`.

    Args:
        skip_known: whether those are left out first that the model knows.
    """
    worker, place = Worker(base.job, base.on_progress, base=base), output_of(base.job, output, options, edits_file)
    if report := up_to_date(worker, output, options, skip_known=skip_known):
        return replace(report, sifted=admitted.sifted)
    if skip_known and not options.dry_run:
        if options.only == (1, 1):  # with more parts than shards some have nothing to do, even when all is done
            place.require()
        admitted = worker.without_known(admitted)
        worker = worker.with_edits(admitted.edits)
    warn_of_unnamed(base, str(edits_file), admitted.numbered)
    place.require_apart()
    report = carry_out(worker, output, options) if admitted.numbered else nothing_to_do(base, worker.job, output)
    return replace(report, sifted=admitted.sifted)


def run(
    job: Job,
    output: Path,
    options: RunOptions = RunOptions(),
    *,
    loaded: Loaded | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> EditReport:
    """Do a job, with a model that may be ``loaded`` already; everything else as in :func:`edit`."""
    return carry_out(Worker(job, on_progress, loaded=loaded), output, options)


def carry_out(worker: Worker, output: Path, options: RunOptions = RunOptions()) -> EditReport:
    """Do the job of a worker, and report edits and consequences apart; everything else as in :func:`edit`."""
    return _carried_out(worker, output, options).with_consequences_apart(worker.job.edits)


def _carried_out(worker: Worker, output: Path, options: RunOptions) -> EditReport:
    """Write this process's shards and return the report; write nothing if they are up to date or only planned."""
    started = time.perf_counter()
    job = worker.job
    mine, count, parts = own_parts(job, options), len(job.edits), len(job.parts)
    unfinished = StagedShards(output, parts)
    if report := up_to_date(worker, output, options):
        return replace(report, seconds=time.perf_counter() - started)
    site = free_site(worker.base, job, output, options)
    if options.dry_run:
        return planned(worker.base, job, site, output)
    if not mine:
        missing = 0 if output.exists() else len(unfinished.missing())
        seconds = time.perf_counter() - started
        return EditReport(output, count, parts, site.layer, site.module, seconds, peak_rss_bytes(), missing=missing)
    with unfinished.opened():
        unfinished.claim(mine)
        try:
            begun, entries, finished = _write(unfinished, worker, mine, options)
        except BaseException as error:
            missing = len(unfinished.missing())
            if len(mine) == parts == missing:
                unfinished.remove()
            elif isinstance(error, KeyboardInterrupt):
                raise StoppedError(parts - missing, parts) from None
            raise
    seconds = time.perf_counter() - started
    missing = 0 if finished is not None else len(unfinished.missing())
    left_out = () if finished is None else finished.left_out
    figures = (seconds, peak_rss_bytes(), untaken(entries), left_out, missing)
    return EditReport(output, count, parts, begun.site.layer, begun.site.module, *figures)


def up_to_date(worker: Worker, output: Path, options: RunOptions, *, skip_known: bool = False) -> EditReport | None:
    """Return the report on shards that are there already, if they are those that are asked for.

    Raises:
        OutputExistsError: they are others, or damaged.
        GateFailedError: an edit did not take then, and all should.
    """
    if options.force:
        return None
    try:
        found = up_to_date_shards(worker, output, skip_known=skip_known)
    finally:
        if not options.dry_run:
            StagedShards(output, len(worker.job.parts)).sweep()
    if found is None:
        return None
    missed = (*untaken(found.shards), *found.left_out)
    if options.strict and missed:
        raise GateFailedError(f"{len(missed)} of {len(found.edits)} edits did not take: {', '.join(missed)}")
    return EditReport.of_shards(output, found, peak_rss_bytes=peak_rss_bytes(), up_to_date=True)


def _write(
    unfinished: StagedShards, worker: Worker, mine: range, options: RunOptions
) -> tuple[ShardDirectory, list[ShardEntry], ShardDirectory | None]:
    """Make or resume the plan, write the missing shards, and finish once all are there."""
    with executor_for(options.executor, worker) as engine:
        with unfinished.alone() as current:
            if not current:
                raise BusyError(unfinished.output)
            plan = _begun(unfinished, worker, force=options.force) or unfinished.begin(*engine.prepare())
        found = {number: unfinished.done(number) for number in mine}
        wanted = [number for number, done in found.items() if done is None]
        if wanted:
            unrelated = load_background(unfinished.path / UNRELATED_NAME, plan.unrelated_sha256)
            for written in engine.write(plan, unrelated, wanted):
                found[written.number] = unfinished.add(written.number, written.done, written.save)
                worker.on_progress(Event("shards", sum(done is not None for done in found.values()), len(mine)))
    dones = [done for done in found.values() if done is not None]
    entries = [done.entry for done in dones if done.entry is not None]
    missed = [*untaken(entries), *(name for done in dones for name in done.left_out)]
    count = sum(len(worker.job.parts[number]) for number in mine)
    # Gradient steps may be too few on purpose.
    nothing = bool(entries) and worker.job.settings.by_facts and len(missed) == count
    if missed and (options.strict or nothing):
        unfinished.forget(mine)
        if nothing:
            raise NothingTookError(count, plan.site.module, plan.site.norm)
        raise GateFailedError(f"{len(missed)} of {count} edits did not take: {', '.join(missed)}")
    unfinished.release()
    with unfinished.alone() as current:
        return plan, entries, unfinished.finish() if current else read_shard_directory(unfinished.output)


def _begun(unfinished: StagedShards, worker: Worker, *, force: bool) -> ShardDirectory | None:
    """Return the plan of a run that was broken off, if it asked for the same."""
    plan = unfinished.plan
    if plan is None:
        return None
    changes = differences(plan, worker)
    if not changes:
        worker.on_progress(Event(NOTE, note=f"going on with {unfinished.output.name}, which was begun before"))
        return plan
    if not force:
        raise ChangedInputError(unfinished.output, changes)
    unfinished.discard()
    return None
