"""``wise merge``: shards → a side memory (a lookup, one matrix, or several) with calibrated thresholds."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from wisecli.bases import find_model
from wisecli.building import Built, Material, join, lookup, matrices, refit, solve_exactly
from wisecli.config import MergeSettings
from wisecli.errors import DamagedFileError, SettingsError
from wisecli.events import Event, Watcher, ignore
from wisecli.manifest import Manifest, write_memory
from wisecli.merging import METHODS, Recipe, merge_deltas
from wisecli.models import require_base
from wisecli.outputs import refuse_existing, require_space, whole_directory
from wisecli.pipeline.reports import peak_rss_bytes, versions
from wisecli.removal import Kept, load_without
from wisecli.removal import without as drop
from wisecli.ridge import Penalty
from wisecli.router import Calibration
from wisecli.shard_directory import ShardDirectory, origin_of, read_shard_directory, require_same_site
from wisecli.shards import Shard
from wisecli.site import load_matrix
from wisecli.storage import Checkpoint
from wisecli.unrelated import Unrelated

EXACT = "exact"
_OF_MATRICES = ("method", "density", "scale", "weights", "refit")
# For shards that no closed form wrote: λ and w.
_PENALTY = Penalty(1e-3, 0.0)


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
    refuse_existing(output, force=force)
    read = [drop(read_shard_directory(path), without.get(path, ())) for path in inputs]
    directories = [kept.directory for kept in read]
    require_same_site(directories)
    first = directories[0]
    settings = _resolved(settings, first)
    base = find_model(model or first.model, revision=first.revision)
    checkpoint = Checkpoint(base)
    require_base(base, checkpoint, first.site, first.fingerprint)
    if settings.mode != "lookup":
        _require_solved(read, settings)
    count = sum(len(directory.shards) for directory in directories)
    site, kept = first.site, count if settings.mode == "retrieve" else 1
    require_space(output, 4 * kept * site.d * site.d_ff)
    edits = tuple(edit for directory in directories for edit in directory.written)
    mode, method = settings.mode or "", settings.method
    if mode == "merge" and settings.refit and method != EXACT and count > 1:
        method += "+refit"
    names = (mode, method, count, len(edits), settings.router or "", settings.routing or "")
    if dry_run:
        peak = 4 * (2 * count + 2) * site.d * site.d_ff
        return MergeReport(output, *names, (), time.perf_counter() - started, peak, planned=True)
    watch(Event("shards"))
    quiet = unrelated_of(directories)
    loaded = [load_without(directory, entry, quiet.tokens) for directory in directories for entry in directory.shards]
    owners: tuple[tuple[str, ...], ...] = (tuple(edit.id for edit in edits),)
    if mode == "retrieve":
        owners = tuple(entry.edits for directory in directories for entry in directory.shards)
    material = _material(directories, loaded, quiet)
    watch(Event("merging"))
    if mode == "lookup":
        memory, calibrations = lookup(material, settings)
    else:
        try:
            memory, calibrations = _in_matrices(directories, loaded, material, settings, load_matrix(checkpoint, site))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # the stubs leave it out
            raise DamagedFileError(first.path, f"its evidence has no solution ({error})", "edit anew") from None
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
        tuple(map(origin_of, directories)),
    )
    with whole_directory(output, force=force) as working:
        write_memory(working, manifest)
    return MergeReport(output, *names, calibrations, time.perf_counter() - started, peak_rss_bytes())


def _require_solved(read: Sequence[Kept], settings: MergeSettings) -> None:
    """Check that matrices can be had without the edits that are to be left out.

    Raises:
        SettingsError: a shard was trained, and holds them still.
    """
    trained = [entry.file for kept in read for entry in kept.trained]
    if trained and settings.method != EXACT:
        raise SettingsError(
            f"{trained[0]} was trained, and its matrix still holds an edit that is to be left out; "
            "write its other edits anew, or merge with --mode lookup or --method exact"
        )


def _material(directories: Sequence[ShardDirectory], shards: Sequence[Shard], unrelated: Unrelated) -> Material:
    places: list[Tensor] = []
    before = 0
    for directory in directories:
        gone = set(directory.left_out)
        kept = torch.tensor([edit.id not in gone for edit in directory.edits])
        places += [kept.cumsum(0) - 1 + before] * len(directory.shards)
        before += int(kept.sum())
    evidence = join([shard.evidence for shard in shards], places)
    number = torch.cat([torch.full((len(shard.evidence.edit),), index) for index, shard in enumerate(shards)])
    return Material(evidence, number, tuple(shard.mask for shard in shards), unrelated)


def unrelated_of(directories: Sequence[ShardDirectory]) -> Unrelated:
    """What the model makes of unrelated text, of all directories; what several have in common counts once."""
    read = list({directory.unrelated_sha256: directory.load_unrelated() for directory in directories}.values())
    keys, chat = (torch.cat([getattr(one, name) for one in read]) for name in ("keys", "chat"))
    chatting = next((one.chatting for one in read if one.chatting is not None), None)
    return replace(read[0], keys=keys, chat=chat, chatting=chatting)


def _in_matrices(
    directories: Sequence[ShardDirectory],
    shards: Sequence[Shard],
    material: Material,
    settings: MergeSettings,
    base: Tensor,
) -> Built:
    deltas = torch.stack([shard.mask.dense(shard.values) for shard in shards])
    if settings.mode == "retrieve":
        return matrices(deltas, material, settings)
    penalty = _penalty(directories)
    if settings.method == EXACT:
        return matrices(solve_exactly(material, penalty)[None], material, settings)
    recipe = _recipe(settings, len(shards), base.float())
    merged = merge_deltas(settings.method, deltas, recipe, scale=settings.scale)
    # A single shard has lost nothing that a refit could give back.
    if settings.refit and len(shards) > 1:
        merged = refit(merged, material, penalty)
    return matrices(merged[None], material, settings)


def _penalty(directories: Sequence[ShardDirectory]) -> Penalty:
    """The lightest that a shard chose: more edits in one matrix stand no heavier one."""
    chosen = [Penalty(*entry.penalty) for directory in directories for entry in directory.shards if entry.penalty]
    return min(chosen, key=lambda one: (one.ridge, one.unrelated), default=_PENALTY)


def _resolved(settings: MergeSettings, shards: ShardDirectory) -> MergeSettings:
    """Fill in what the shards' own settings decide, and check the rest before anything is read."""
    known = (*sorted(METHODS), EXACT)
    if settings.method not in known:
        raise SettingsError(f"--method {settings.method!r} is unknown; choose one of {', '.join(known)}")
    solved = shards.settings["writer"] == "solve"
    inherited = {name: shards.settings[name] for name in ("router", "routing", "threshold")}
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    whole = {**inherited, "refit": solved, **given}
    if "mode" not in whole:
        # To say how matrices are to be merged is to ask for a matrix.
        silent = all(getattr(settings, name) == getattr(MergeSettings, name) for name in _OF_MATRICES)
        whole["mode"] = "lookup" if solved and whole["router"] == "key" and silent else "merge"
    if whole["mode"] == "lookup" and whole["router"] != "key":
        raise SettingsError("--mode lookup finds its keys by the key router; leave out --router norm")
    return MergeSettings(**whole)


def _recipe(settings: MergeSettings, count: int, base: Tensor) -> Recipe:
    weights = settings.weights or (1.0,) * count
    if len(weights) != count:
        raise SettingsError(f"--weights has {len(weights)} numbers for {count} shards; give one a shard")
    return Recipe(torch.tensor(weights), settings.density, base, torch.Generator().manual_seed(settings.seed))
