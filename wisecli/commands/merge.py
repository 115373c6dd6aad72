"""``wise merge``: shards → a side memory (a lookup, one matrix, or several) with calibrated thresholds."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from wisecli.artifacts.memory_manifest import write_memory
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.outputs import memory_output
from wisecli.config import MergeSettings
from wisecli.environment import peak_rss_bytes
from wisecli.io.atomic_output import require_space, whole_directory
from wisecli.memory.merger import Merger
from wisecli.memory.removal import without as drop
from wisecli.progress import Watcher, ignore
from wisecli.routing.calibration import Calibration


@dataclass(frozen=True)
class MergeReport:
    """What ``wise merge`` did, or with ``planned`` would do."""

    output: Path
    mode: str
    method: str
    shards: int
    edits: int
    router: str
    routing: str
    calibrations: tuple[Calibration, ...]
    seconds: float
    peak_rss_bytes: int
    planned: bool = False


def merge(
    inputs: Sequence[Path],
    output: Path,
    settings: MergeSettings,
    *,
    without: Mapping[Path, Collection[str]] = MappingProxyType({}),
    model: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    watch: Watcher = ignore,
) -> MergeReport:
    """Join shards into a memory. Reads the shard files and the one base matrix, never the model.

    Args:
        inputs: directories that ``wise edit`` wrote, of the same matrix of the same model.
        without: ids of edits that count as never written, by the directory they are in.
        model: where the base model is now, if not where the shards say.

    Raises:
        WiseError: the shards, the base or the disk cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    memory_output(output, inputs, force=force).require()
    read = [drop(read_shard_directory(path), without.get(path, ())) for path in inputs]
    merger = Merger(read, settings, model=model)
    settings, site, count = merger.settings, merger.site, merger.count
    require_space(output, 4 * (count if settings.mode == "retrieve" else 1) * site.d * site.d_ff)
    names = (
        settings.mode or "",
        merger.method,
        count,
        len(merger.edits),
        settings.router or "",
        settings.routing or "",
    )
    if dry_run:
        peak = 4 * (2 * count + 2) * site.d * site.d_ff
        return MergeReport(output, *names, (), time.perf_counter() - started, peak, planned=True)
    manifest = merger.merge(watch)
    with whole_directory(output, force=force) as working:
        write_memory(working, manifest)
    return MergeReport(output, *names, manifest.calibrations, time.perf_counter() - started, peak_rss_bytes())
