"""``wise edit --into``: edits → shards → the next release of a memory that is edited again and again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wisecli.artifacts.shard_manifest import MANIFEST_NAME as SHARDS_MANIFEST
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.planning import warn_of_unnamed
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.edit.writing import carry_out
from wisecli.commands.memory.remove import without_edits
from wisecli.config import EditSettings, LoadOptions, resolve
from wisecli.editing.run.job import Job
from wisecli.editing.run.staging import StagedShards
from wisecli.editing.run.worker import Worker
from wisecli.edits.checks.admission import DEFAULT_ADMISSION, Admission, AdmissionReport, Admitted, Sheet
from wisecli.edits.record import Edit, Numbered
from wisecli.errors import ChangedInputError, DamagedFileError, SettingsError
from wisecli.io.atomic_output import discard
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_file
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import Change, Provenance, Release, changing, shard_path
from wisecli.memory.history.releases import publish
from wisecli.memory.history.superseded_edits import superseding, with_consequences
from wisecli.models.loading import Loaded, require_base
from wisecli.models.model_files import find_model
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class IntoReport:
    """What one batch of edits did to a memory; ``known`` names those that it held already, just as they are.

    If nothing but such was left, nothing was ``edited``, and ``release`` is the newest as it was, if there is one.
    ``sifted`` is what else was left out before training.
    """

    memory: Path
    release: Release | None
    held: int
    known: tuple[str, ...]
    edited: EditReport | None
    seconds: float
    sifted: AdmissionReport = field(default_factory=AdmissionReport)


@dataclass(frozen=True)
class Batch:
    """Edits that land together, with their lines, and where they come from: ``name`` is the file's."""

    numbered: tuple[Numbered, ...]
    origin: dict[str, str]

    @classmethod
    def of(cls, sheet: Sheet) -> Batch:
        """Return a whole file of edits that was read before."""
        return cls(sheet.numbered, {"name": sheet.name, "sha256": sheet.sha256})


@dataclass(frozen=True)
class IntoMemory:
    """The model and the memory that batches of edits are written for, and how.

    Args:
        flags: settings of :class:`EditSettings`; those that are ``None`` are as the memory's newest shards have them.
        load: all but its ``revision``.
        options: of these only ``executor`` and ``strict`` count.
        admission: what is asked of edits that the memory does not hold yet. What the model says already is trained all
            the same if it takes the place of what the memory holds.
    """

    model: str
    memory: Path
    flags: Mapping[str, Any]
    config: Path | None = None
    provenance: Provenance = Provenance()
    load: LoadOptions = LoadOptions()
    options: RunOptions = RunOptions()
    admission: Admission = DEFAULT_ADMISSION


def edit_into(
    into: IntoMemory, batch: Batch, *, loaded: Loaded | None = None, on_progress: ProgressCallback = ignore_progress
) -> IntoReport:
    """Write edits against the same base and the same matrix as those that a memory holds, and join all of them.

    An edit of a fact that the memory holds already takes the place of the earlier one, which stays in the history. A
    run that was broken off goes on where it was when it is asked for again in the same way.

    Args:
        loaded: the model, if it is there already.

    Raises:
        MemoryHistoryError: the directory holds a memory that was made otherwise.
        WiseError: any of the input, the model or the disk cannot be used; the memory is as it was.
    """
    started, model, memory = time.perf_counter(), into.model, into.memory
    pending = memory.absolute().parent / f".{memory.name}.shards"
    with changing(memory):
        opened = OpenMemory(memory, may_be_new=True)
        held, releases = opened.require_whole(), opened.releases
        _discard_merged(opened, pending)
        already = set(held)
        known = tuple(edit.id for _, edit in batch.numbered if edit in already)
        admitted = into.admission.admit(batch.origin["name"], batch.numbered, held=held, on_progress=on_progress)
        worker = None
        if admitted.numbered:
            worker = _worker(opened, into, batch.origin["name"], admitted, loaded, on_progress)
            if into.admission.skip_known:
                admitted = worker.without_known(admitted, spared=set(_replaced_edits(held, admitted).values()))
                worker = worker.with_edits(admitted.edits)
        if worker is None or not admitted.numbered:
            seconds, newest = time.perf_counter() - started, releases[-1] if releases else None
            return IntoReport(memory, newest, len(held), known, None, seconds, admitted.sifted)
        edited = _written(worker, pending, into.options)
        del worker  # the model is let go before shards are merged
        giving_way = _replaced_edits(held, admitted)
        with without_edits(opened, giving_way, model=model, load=into.load, on_progress=on_progress) as left:
            name = opened.name_after(left.new)
            change = Change(
                "edit",
                {**left.shards, name: ()},
                added=tuple(edit.id for edit in opened.shards_at(pending).written),
                replaced=giving_way,
                edits_file=batch.origin,
                provenance=into.provenance,
            )
            new = {**left.new, name: pending}
            published = publish(opened, change, opened.merging, new=new, model=model, on_progress=on_progress)
        discard(pending, memory)
    seconds = time.perf_counter() - started
    return IntoReport(memory, published.release, published.held, known, edited, seconds, admitted.sifted)


def _worker(
    memory: OpenMemory,
    into: IntoMemory,
    name: str,
    admitted: Admitted,
    loaded: Loaded | None,
    on_progress: ProgressCallback,
) -> Worker:
    """Return the worker that writes a file's admitted edits, after checking them against the tokenizer."""
    settings = _settings(memory, into)
    newest = memory.newest_shards() if memory.releases else None
    job = Job(
        model=into.model,
        settings=settings,
        edits=admitted.edits,
        load=replace(into.load, revision=None),
        target_module=newest.made.target_module if newest else None,
        learned=newest.path if newest else None,
    )
    worker = Worker(job, on_progress, loaded=loaded)
    worker.base.reader.require(name, admitted.numbered, settings, allow_special=into.admission.allow_special)
    warn_of_unnamed(worker.base, name, admitted.numbered)
    return worker


def _discard_merged(memory: OpenMemory, pending: Path) -> None:
    """Take away shards of a run that was killed when its release was in place already."""
    if not pending.is_dir():
        return
    manifest = pending / SHARDS_MANIFEST
    names = [name for release in memory.releases[-1:] for name in release.shards]
    taken = {sha256_file(shard_path(memory.path, name) / SHARDS_MANIFEST) for name in names}
    if not manifest.is_file() or sha256_file(manifest) in taken:
        discard(pending, memory.path)


def _replaced_edits(held: Sequence[Edit], admitted: Admitted) -> dict[str, str]:
    """Return the held edits that new ones replace, and their consequences, each with the id that takes its place."""
    found = {**admitted.superseded, **superseding(held, admitted.edits)}
    return with_consequences(held, admitted.edits, found)


def _written(worker: Worker, pending: Path, options: RunOptions) -> EditReport:
    """Write the shards of a batch, unless a run that was broken off before it could merge them has written them.

    Raises:
        ChangedInputError: it wrote other edits.
    """
    try:
        done = read_shard_directory(pending)
    except DamagedFileError:
        return carry_out(worker, pending, replace(options, only=(1, 1), force=True, dry_run=False))
    StagedShards(pending, len(done.shards)).sweep()
    if done.edits != worker.job.edits:
        raise ChangedInputError(pending, ["the edits are others"])
    return EditReport.of_shards(pending, done, peak_rss_bytes=0)


def _settings(memory: OpenMemory, into: IntoMemory) -> EditSettings:
    """Return the newest shards' settings with those given in place; the site is always the same.

    Raises:
        SettingsError: another layer, or a site of another kind, is asked for.
        WrongBaseError: the model is another.
    """
    if not memory.releases:
        return resolve(EditSettings, into.flags, section="edit", file=into.config)
    newest = memory.newest_shards()
    directory = find_model(into.model, revision=newest.revision)
    require_base(directory, Checkpoint(directory), newest.site, newest.fingerprint)
    given = {name: value for name, value in into.flags.items() if value is not None}
    wanted = given.pop("layer", "auto")
    if wanted not in ("auto", str(newest.site.layer)):
        raise SettingsError(f"--layer {wanted}: {memory.path} edits layer {newest.site.layer}; leave the flag out")
    site = newest.site.name
    if (other := given.pop("site", "auto")) not in ("auto", site):
        raise SettingsError(f"--set site={other}: {memory.path} has its edits at a {site}; leave it out")
    kept = {**newest.settings, "shards": None, **given}
    settings = resolve(EditSettings, {**kept, "site": site}, section="edit", file=into.config)
    return replace(settings, layer=str(newest.site.layer))
