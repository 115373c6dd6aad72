"""``wise edit``: edits → shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wisecli.artifacts.background_stats import load_background
from wisecli.artifacts.shard_manifest import (
    UNRELATED_NAME,
    ShardDirectory,
    ShardEntry,
    read_shard_directory,
)
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.outputs import shards_output
from wisecli.config import EditSettings, LoadOptions
from wisecli.editing.run.executors import executor_for
from wisecli.editing.run.job import Job
from wisecli.editing.run.resource_estimate import Plan, plan_edit
from wisecli.editing.run.shard_differences import differences, up_to_date_shards
from wisecli.editing.run.staging import StagedShards
from wisecli.editing.run.worker import Worker
from wisecli.edits.checks.admission import DEFAULT_ADMISSION, Admission, AdmissionReport, Sheet
from wisecli.edits.checks.unnamed_subjects import warn_of_unnamed_subjects
from wisecli.edits.record import Edit, consequences_in
from wisecli.environment import peak_rss_bytes, peak_vram_bytes
from wisecli.errors import BusyError, ChangedInputError, GateFailedError, NothingTookError, StoppedError
from wisecli.io.atomic_output import require_space
from wisecli.io.overwrite_policy import Output
from wisecli.models.layout.site import Site, find_site
from wisecli.models.loading import Loaded, machine_memory, pick_device, pick_dtype
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress

# About what the statistics of unrelated text take: keys in half precision, two moments.
_KEPT_KEYS, _KEPT_DIRECTIONS = 4096, 1024


@dataclass(frozen=True)
class EditReport:
    """What ``wise edit`` did, or with a ``plan`` would do.

    ``edits`` counts those that were asked for, and ``consequences`` are what else was written as following from them.
    ``untaken`` names the edits of whose target some token is not the arg-max after the bare prompt, before merging:
    with what the gradient writer trained, or with the residuals that the closed form found. ``left_out`` names those
    for which the model gives nothing finite. ``missing`` counts the shards that other processes are to write.
    ``plan`` is what the run would take, if it was only planned.
    ``differing`` names the shards that are not those of the manifest that was to be reproduced, if one was.
    ``sifted`` is what was left out before training; if that was all, there are no edits and nothing was written.
    ``peak_vram_bytes`` is nought where no GPU took part. ``up_to_date`` says that the shards were there already.
    """

    output: Path
    edits: int
    shards: int
    layer: int
    module: str
    seconds: float
    peak_rss_bytes: int
    untaken: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: int = 0
    plan: Plan | None = None
    differing: tuple[str, ...] | None = None
    sifted: AdmissionReport = field(default_factory=AdmissionReport)
    peak_vram_bytes: int = field(default_factory=peak_vram_bytes)
    up_to_date: bool = False
    consequences: tuple[Edit, ...] = ()

    @property
    def planned(self) -> bool:
        """Whether nothing was done."""
        return self.plan is not None

    @property
    def seconds_per_edit(self) -> float:
        """Whole running time, loading included, over the edits and their consequences."""
        return self.seconds / max(1, self.edits + len(self.consequences))

    def told_apart(self, edits: Sequence[Edit]) -> EditReport:
        """Return the same report with the consequences among what was written counted apart."""
        consequences = consequences_in(edits)
        return replace(self, edits=len(edits) - len(consequences), consequences=consequences)

    def check(self) -> None:
        """Raise if shards were to be reproduced and others came out.

        Raises:
            GateFailedError: naming them.
        """
        if self.differing:
            raise GateFailedError(f"{self.output}: {', '.join(self.differing)} differ from those of the manifest")


def edit(
    model: str,
    edits_file: Path,
    output: Path,
    settings: EditSettings,
    *,
    load: LoadOptions = LoadOptions(),
    target_module: str | None = None,
    options: RunOptions = RunOptions(),
    admission: Admission = DEFAULT_ADMISSION,
    sheet: Sheet | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> EditReport:
    """Write each shard of edits into a delta of the model's value matrix.

    A run that was broken off goes on where it was when it is asked for again in the same way; one that was finished
    has nothing to do.

    Args:
        model: a directory, a hub id or a GGUF file.
        target_module: path of the value matrix, with ``{layer}`` for the layer's index, where the table's is not meant.
        admission: what is asked of the edits before; what it leaves out with the model's help is planned for all the
            same.
        sheet: what the file holds, if it was read before.

    Raises:
        WiseError: any of the input, the model or the disk cannot be used; nothing is left behind but finished shards.
    """
    started = time.perf_counter()
    sheet = sheet or admission.read(edits_file)
    admitted = admission.admit(sheet.name, sheet.numbered, on_progress=on_progress)
    job = Job(model=model, settings=settings, edits=admitted.edits, load=load, target_module=target_module)
    worker = Worker(job, on_progress)
    worker.reader.require(sheet.name, admitted.numbered, settings, allow_special=admission.allow_special)
    if report := _up_to_date(worker, output, options, skip_known=admission.skip_known):
        return replace(report, seconds=time.perf_counter() - started, sifted=admitted.sifted)
    if admission.skip_known and not options.dry_run:
        if options.only == (1, 1):  # with more parts than shards some have nothing to do, even when all is done
            _output(job, output, options, edits_file).require()
        admitted = worker.without_known(admitted)
        worker = worker.with_edits(admitted.edits)
    if settings.by_facts:
        warn_of_unnamed_subjects(sheet.name, admitted.numbered, on_progress)
    _output(job, output, options, edits_file).require_apart()
    report = carry_out(worker, output, options) if admitted.numbered else _nothing(worker, output)
    return replace(report, seconds=time.perf_counter() - started, sifted=admitted.sifted)


def _output(job: Job, output: Path, options: RunOptions, *inputs: Path) -> Output:
    """Return where shards go, and that only former shards may be replaced there."""
    return shards_output(output, job.model, *inputs, force=options.force)


def _nothing(worker: Worker, output: Path) -> EditReport:
    """Return what a run without edits did."""
    site = find_site(worker.checkpoint.directory, worker.checkpoint, worker.job.settings.layer, worker.layout)
    return EditReport(output, 0, 0, site.layer, site.module, 0.0, peak_rss_bytes())


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
    """Do the job of a worker; everything else as in :func:`edit`."""
    return _carried_out(worker, output, options).told_apart(worker.job.edits)


def _carried_out(worker: Worker, output: Path, options: RunOptions) -> EditReport:
    started = time.perf_counter()
    job = worker.job
    parts, (part, of) = job.parts, options.only
    mine = range((part - 1) * len(parts) // of, part * len(parts) // of)
    unfinished = StagedShards(output, len(parts))
    if report := _up_to_date(worker, output, options):
        return replace(report, seconds=time.perf_counter() - started)
    if mine:  # with more parts than shards some have nothing to do, even when all is done
        _output(job, output, options).require()
    settings, checkpoint, count = job.settings, worker.checkpoint, len(job.edits)
    site = find_site(checkpoint.directory, checkpoint, settings.layer, worker.layout)
    require_space(output, _expected_bytes(site, settings, count, len(parts)))
    if options.dry_run:
        load = job.load
        kind, budget = pick_dtype(load.dtype), load.memory_budget or machine_memory(pick_device(load.device))
        lengths = [worker.reader.length(edit, settings) for edit in job.edits]
        plan = plan_edit(checkpoint, site, settings, lengths, dtype=kind, memory_budget=budget)
        seconds = time.perf_counter() - started
        return EditReport(output, count, len(parts), site.layer, site.module, seconds, plan.peak, plan=plan)
    if not mine:
        missing = 0 if output.exists() else len(unfinished.missing())
        seconds = time.perf_counter() - started
        return EditReport(
            output, count, len(parts), site.layer, site.module, seconds, peak_rss_bytes(), (), (), missing
        )
    with unfinished.opened():
        unfinished.claim(mine)
        try:
            begun, entries, finished = _write(unfinished, worker, mine, options)
        except BaseException as error:
            missing = len(unfinished.missing())
            if len(mine) == len(parts) == missing:
                unfinished.remove()
            elif isinstance(error, KeyboardInterrupt):
                raise StoppedError(len(parts) - missing, len(parts)) from None
            raise
    seconds = time.perf_counter() - started
    missing = 0 if finished is not None else len(unfinished.missing())
    left_out = () if finished is None else finished.left_out
    figures = (seconds, peak_rss_bytes(), _untaken(entries), left_out, missing)
    return EditReport(output, count, len(parts), begun.site.layer, begun.site.module, *figures)


def _up_to_date(worker: Worker, output: Path, options: RunOptions, *, skip_known: bool = False) -> EditReport | None:
    """Return what there is to say of shards that are there already, if they are what is asked for.

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
    missed = (*_untaken(found.shards), *found.left_out)
    if options.strict and missed:
        raise GateFailedError(f"{len(missed)} of {len(found.edits)} edits did not take: {', '.join(missed)}")
    site = found.site
    figures = (0.0, peak_rss_bytes(), _untaken(found.shards), found.left_out)
    report = EditReport(output, len(found.edits), len(found.shards), site.layer, site.module, *figures, up_to_date=True)
    return report.told_apart(found.edits)


def _write(
    unfinished: StagedShards, worker: Worker, mine: range, options: RunOptions
) -> tuple[ShardDirectory, list[ShardEntry], ShardDirectory | None]:
    """Plan or take up the plan, write what is missing, finish if nothing is missing any more."""
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
    missed = [*_untaken(entries), *(name for done in dones for name in done.left_out)]
    count = sum(len(worker.job.parts[number]) for number in mine)
    # Gradient steps may be too few on purpose.
    nothing = worker.job.settings.by_facts and len(_untaken(entries)) == count
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


def _untaken(entries: Sequence[ShardEntry]) -> tuple[str, ...]:
    return tuple(name for entry in entries for name in entry.untaken)


def _expected_bytes(site: Site, settings: EditSettings, edits: int, shards: int) -> int:
    """Size of the shards to be written, taking six key positions an edit and prompt."""
    keys = edits * (settings.contexts + settings.augment + 2) * 6
    size = settings.mask_ratio * site.d * site.width * (4 if settings.mask_kind == "columns" else 8)
    size *= not settings.for_lookup
    return round(
        shards * size + 2 * keys * (site.d + site.width) + (2 * _KEPT_KEYS + 4 * _KEPT_DIRECTIONS) * site.width
    )
