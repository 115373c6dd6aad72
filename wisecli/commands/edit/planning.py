"""Where shards go and what writing them would take, found without torch or any weights."""

import time
from collections.abc import Sequence
from pathlib import Path

from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.outputs import shards_output
from wisecli.config import EditSettings
from wisecli.editing.background.sample_sizes import CALIBRATION_KEYS
from wisecli.editing.run.base_model import Base
from wisecli.editing.run.job import Job
from wisecli.editing.run.resource_estimate import plan_edit
from wisecli.edits.checks.unnamed_subjects import warn_of_unnamed_subjects
from wisecli.edits.record import Numbered
from wisecli.environment import peak_rss_bytes
from wisecli.io.atomic_output import require_space
from wisecli.io.overwrite_policy import Output
from wisecli.models.layout.site import Site, find_site
from wisecli.models.loading import device_memory, require_dtype

# About how many directions the moments of unrelated text have together.
_KEPT_DIRECTIONS = 1024


def output_of(job: Job, output: Path, options: RunOptions, *inputs: Path) -> Output:
    """Return where shards go, and that only former shards may be replaced there."""
    return shards_output(output, job.model, *inputs, force=options.force)


def warn_of_unnamed(base: Base, name: str, numbered: Sequence[Numbered]) -> None:
    """Warn of edits in a file of this name that have no subject, where the router goes by subjects."""
    if base.job.settings.by_facts:
        warn_of_unnamed_subjects(name, numbered, base.on_progress)


def own_parts(job: Job, options: RunOptions) -> range:
    """Return the numbers of the shards that this run is to write."""
    count, (part, of) = len(job.parts), options.only
    return range((part - 1) * count // of, part * count // of)


def free_site(base: Base, job: Job, output: Path, options: RunOptions) -> Site:
    """Return the site that a job edits, once its shards may be written and there is room for them.

    Raises:
        OutputExistsError, ProtectedOutputError: they may not be.
        NoSpaceError: there is no room.
    """
    if own_parts(job, options):  # with more parts than shards some have nothing to do, even when all is done
        output_of(job, output, options).require()
    site = site_of(base, job)
    require_space(output, _expected_bytes(site, job.settings, len(job.edits), len(job.parts)))
    return site


def site_of(base: Base, job: Job) -> Site:
    """Return the site that a job edits, as far as it is known without the model's weights."""
    return find_site(base.checkpoint.directory, base.checkpoint, job.settings.layer, base.layout)


def planned(base: Base, job: Job, site: Site, output: Path) -> EditReport:
    """Return what a job would do, and what that would take."""
    started, load = time.perf_counter(), job.load
    require_dtype(load.dtype)
    budget = load.memory_budget or device_memory(load.device)
    reader = base.reader
    forms = reader.trained_forms(job.settings)
    lengths = [reader.length(edit, job.settings, forms) for edit in job.edits]
    plan = plan_edit(
        base.checkpoint,
        site,
        job.settings,
        lengths,
        dtype=load.dtype,
        memory_budget=budget,
        experts=base.layout.experts,
    )
    seconds = time.perf_counter() - started
    return EditReport(
        output, len(job.edits), len(job.parts), site.layer, site.module, seconds, plan.peak, plan=plan
    ).with_consequences_apart(job.edits)


def nothing_to_do(base: Base, job: Job, output: Path) -> EditReport:
    """Return what a run without edits did."""
    site = site_of(base, job)
    return EditReport(output, 0, 0, site.layer, site.module, 0.0, peak_rss_bytes())


def _expected_bytes(site: Site, settings: EditSettings, edits: int, shards: int) -> int:
    """Return the size of the shards to be written, taking six key positions an edit and prompt."""
    keys = edits * (settings.contexts + settings.augment + 2) * 6
    size = settings.mask_ratio * site.d * site.width * (4 if settings.mask_kind == "columns" else 8)
    size *= not settings.for_lookup
    return round(
        shards * size + 2 * keys * (site.d + site.width) + (2 * CALIBRATION_KEYS + 4 * _KEPT_DIRECTIONS) * site.width
    )
