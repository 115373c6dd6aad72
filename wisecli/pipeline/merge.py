"""``wise merge``: shards → one side memory, or several side by side, with calibrated thresholds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wisecli.config import MergeSettings
from wisecli.errors import SettingsError
from wisecli.events import Event, Watcher, ignore
from wisecli.memory import RoutedMatrix, SideMemory
from wisecli.merging import METHODS, Recipe, merge_deltas
from wisecli.models import require_base
from wisecli.pipeline.reports import peak_rss_bytes, versions
from wisecli.router import Calibration, Manifest, calibrate, key_router, scores, whitening, write_memory
from wisecli.shard_directory import ShardDirectory, read_shard_directory, require_same_site
from wisecli.shards import Evidence, Shard, Unrelated
from wisecli.site import load_matrix
from wisecli.storage import Checkpoint, refuse_existing, require_space, resolve_model, whole_directory


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
    model: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    watch: Watcher = ignore,
) -> MergeReport:
    """Join shards into a memory. Reads the shard files and the one base matrix, never the model.

    Args:
        inputs: directories that ``wise edit`` wrote, of the same matrix of the same model.
        model: where the base model is now, if not where the shards say.

    Raises:
        WiseError: the shards, the base or the disk cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    refuse_existing(output, force=force)
    directories = [read_shard_directory(path) for path in inputs]
    require_same_site(directories)
    first = directories[0]
    settings = _resolved(settings, first)
    base = resolve_model(model or first.model, revision=first.revision)
    checkpoint = Checkpoint(base)
    require_base(base, checkpoint, first.site, first.fingerprint)
    count = sum(len(directory.shards) for directory in directories)
    site, kept = first.site, count if settings.mode == "retrieve" else 1
    require_space(output, 4 * kept * site.d * site.d_ff)
    edits = tuple(edit for directory in directories for edit in directory.edits)
    names = (settings.mode, settings.method, count, len(edits), settings.router or "", settings.routing or "")
    if dry_run:
        peak = 4 * (2 * count + 2) * site.d * site.d_ff
        return MergeReport(output, *names, (), time.perf_counter() - started, peak, planned=True)
    watch(Event("shards"))
    shards = [directory.load(entry) for directory in directories for entry in directory.shards]
    owners = tuple(entry.edits for directory in directories for entry in directory.shards)
    deltas = torch.stack([shard.mask.dense(shard.values) for shard in shards])
    if settings.mode == "merge":
        watch(Event("merging"))
        recipe = _recipe(settings, count, load_matrix(checkpoint, site).float())
        deltas = merge_deltas(settings.method, deltas, recipe, scale=settings.scale)[None]
        owners = (tuple(edit.id for edit in edits),)
    watch(Event("calibration"))
    unrelated = [directory.load_unrelated() for directory in directories]
    memory, calibrations = route(deltas, shards, unrelated, settings)
    manifest = Manifest(
        first.model if model is None else str(base.absolute()),
        first.revision,
        first.fingerprint,
        site,
        memory,
        calibrations,
        owners,
        {**asdict(settings), "shards": [[str(directory.path), len(directory.shards)] for directory in directories]},
        edits,
        versions(),
    )
    with whole_directory(output, force=force) as working:
        write_memory(working, manifest)
    return MergeReport(output, *names, calibrations, time.perf_counter() - started, peak_rss_bytes())


def _resolved(settings: MergeSettings, shards: ShardDirectory) -> MergeSettings:
    """Fill in what the shards' own settings decide, and check the rest before anything is read."""
    if settings.method not in METHODS:
        raise SettingsError(f"--method {settings.method!r} is unknown; choose one of {', '.join(sorted(METHODS))}")
    inherited = {name: shards.settings[name] for name in ("router", "routing", "threshold")}
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    return MergeSettings(**{**inherited, **given})


def _recipe(settings: MergeSettings, count: int, base: Tensor) -> Recipe:
    weights = settings.weights or (1.0,) * count
    if len(weights) != count:
        raise SettingsError(f"--weights has {len(weights)} numbers for {count} shards; give one a shard")
    return Recipe(torch.tensor(weights), settings.density, base, torch.Generator().manual_seed(settings.seed))


def route(
    deltas: Tensor, shards: Sequence[Shard], unrelated: Sequence[Unrelated], settings: MergeSettings
) -> tuple[SideMemory, tuple[Calibration, ...]]:
    """Build the memory of deltas (M, d, d_ff), with a threshold for each decided on its own edits."""
    tensors = pack(deltas)
    evidence = [shard.evidence for shard in shards]
    # One memory owns all the evidence; of several, each owns its shard's.
    owned = [evidence] if len(deltas) == 1 else [[part] for part in evidence]
    floor = 1.0
    if settings.router == "key":
        keys = [torch.cat([part.keys[~part.held_out] for part in parts]) for parts in owned]
        owner = torch.cat([torch.full((len(part),), number) for number, part in enumerate(keys)])
        first = unrelated[0]
        white = whitening(first.variances, first.directions, float(first.energy), deltas.shape[-1])
        tensors |= key_router(torch.cat(keys), owner, white)
        floor = white.floor
    draft = SideMemory(tensors, (1.0,) * len(deltas), settings.router or "key", settings.routing or "token", floor)
    routed = RoutedMatrix(nn.Linear(1, 1, bias=False), draft, transposed=False)
    quiet = scores(routed, torch.cat([part.keys for part in unrelated]))
    calibrations = []
    for number, parts in enumerate(owned):
        loud = scores(routed, torch.cat([_calibrating(part, settings) for part in parts]))[:, number]
        rule, false_alarm = settings.threshold or "false-alarm", settings.false_alarm
        calibrations.append(calibrate(loud, quiet[:, number], rule=rule, false_alarm=false_alarm))
    thresholds = tuple(calibration.threshold for calibration in calibrations)
    return SideMemory(tensors, thresholds, draft.router, draft.routing, floor), tuple(calibrations)


def _calibrating(evidence: Evidence, settings: MergeSettings) -> Tensor:
    """Keys that ought to be routed: under the unseen context, or for the paper's rule under those trained on."""
    chosen = ~evidence.held_out if settings.threshold == "minimum" else evidence.held_out
    if settings.routing == "sequence":
        chosen = chosen & (evidence.position == 0)
    return evidence.keys[chosen]


def pack(deltas: Tensor) -> dict[str, Tensor]:
    """Dense deltas (M, d, d_ff) → the columns they touch (M, k), padded with empty ones, and ``Δ`` there (M, d, k)."""
    used = [delta.abs().sum(0).nonzero().flatten() for delta in deltas]
    width = max(1, *(len(columns) for columns in used))
    columns = torch.zeros(len(deltas), width, dtype=torch.long)
    packed = deltas.new_zeros(len(deltas), deltas.shape[1], width)
    for number, touched in enumerate(used):
        columns[number, : len(touched)] = touched
        packed[number, :, : len(touched)] = deltas[number][:, touched]
    return {"columns": columns, "delta": packed}
