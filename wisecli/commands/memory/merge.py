"""``wise merge``: shards → a side memory (a lookup, one matrix, or several) with calibrated thresholds."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from wisecli.artifacts.checksums import write_checksums
from wisecli.artifacts.memory_manifest import write_memory
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.outputs import memory_output
from wisecli.config import MergeSettings
from wisecli.edits.record import consequences_in
from wisecli.environment import peak_rss_bytes
from wisecli.errors import ProtectedOutputError
from wisecli.io.atomic_output import require_space, tidy, whole_directory
from wisecli.memory.history.release_log import Provenance, changing, is_merged
from wisecli.memory.history.releases import publish_first
from wisecli.memory.merging.memory_differences import ExtendedMemory, extended_memory, up_to_date_memory
from wisecli.memory.merging.merger import Merger
from wisecli.memory.merging.removal import without as drop
from wisecli.progress import ProgressCallback, ignore_progress
from wisecli.routing.memories.calibration import Calibration


@dataclass(frozen=True)
class MergeReport:
    """What ``wise merge`` did, or with ``planned`` would do; ``up_to_date`` says that the memory was there already.

    ``consequences`` of edits are counted apart from them. Of a memory that has grown since, ``held`` are the edits that
    it holds now, and ``gone`` ids of those that were asked for and that it no longer holds.
    """

    output: Path
    mode: str
    method: str
    shards: int
    edits: int
    by_facts: bool
    calibrations: tuple[Calibration, ...]
    seconds: float
    peak_rss_bytes: int
    planned: bool = False
    up_to_date: bool = False
    consequences: int = 0
    held: int | None = None
    gone: tuple[str, ...] = ()


def merge(
    inputs: Sequence[Path],
    output: Path,
    settings: MergeSettings,
    *,
    without: Mapping[Path, Collection[str]] = MappingProxyType({}),
    model: str | None = None,
    history: bool = True,
    provenance: Provenance = Provenance(),
    force: bool = False,
    dry_run: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> MergeReport:
    """Join shards into a memory. Reads the shard files and the one base matrix, never the model.

    A memory of the same shards and settings that is there already, and may have grown since, is not written anew.

    Args:
        inputs: directories that ``wise edit`` wrote, of the same matrix of the same model.
        without: ids of edits that count as never written, by the directory they are in.
        model: where the base model is now, if not where the shards say.
        history: whether the memory keeps the shards, so that it can be changed and looked back on.

    Raises:
        WiseError: the shards, the base or the disk cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    place = memory_output(output, inputs, force=force)
    grown = not is_merged(output)
    if grown and (force or without or not history):
        _require_merged(output)
    place.require_unless_kept()
    there = place.is_kept
    read = [drop(read_shard_directory(path), without.get(path, ())) for path in inputs]
    merger = Merger(read, settings, model=model)
    settings, site, count = merger.settings, merger.site, merger.count
    followed = len(consequences_in(merger.edits))
    names = settings.mode or "", merger.method, count, len(merger.edits) - followed, merger.by_facts
    report = partial(MergeReport, output, *names, consequences=followed)
    if there and not dry_run:
        tidy(output)
    signed = provenance.key is not None
    now = extended_memory(merger, output, signed=signed) if grown else None
    if now is None:
        _require_merged(output)
        found = up_to_date_memory(merger, output, history=history, signed=signed) if there else None
        now = None if found is None else ExtendedMemory(found)
    if now is not None:
        measured = now.manifest.memories, time.perf_counter() - started, peak_rss_bytes()
        held = len(now.manifest.edits) if grown else None
        return report(*measured, up_to_date=True, held=held, gone=now.gone)
    require_space(output, 4 * (count if settings.mode == "retrieve" else 1) * site.d * site.width)
    if dry_run:
        peak = 4 * (2 * count + 2) * site.d * site.width
        return report((), time.perf_counter() - started, peak, planned=True)
    merged = merger.merge(on_progress)
    manifest = merged.manifest
    with changing(output):
        _require_merged(output)
        place.require()
        if history:
            publish_first(output, merged, read, provenance)
        else:
            with whole_directory(output, force=force) as working:
                write_memory(working, manifest, sealed=True)
                write_checksums(working, provenance.key)
    return report(manifest.calibrations, time.perf_counter() - started, peak_rss_bytes())


def _require_merged(output: Path) -> None:
    """Check that no history would be lost that a merge could not write again.

    Raises:
        ProtectedOutputError: it would.
    """
    if not is_merged(output):
        raise ProtectedOutputError(output, "has a history (`wise merge --into` goes on with it)")
