"""Shards → the memory that joins them, with all that its manifest says: what ``wise merge`` does."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.artifacts.shard import Shard
from wisecli.artifacts.shard_manifest import ShardDirectory, origin_of, require_same_site
from wisecli.config import MergeSettings
from wisecli.editing.writers.ridge import Penalty
from wisecli.environment import versions
from wisecli.errors import DamagedFileError, SettingsError
from wisecli.io.checkpoint import Checkpoint
from wisecli.memory.fitting.former_memory import EditProbs, FormerMemory
from wisecli.memory.fitting.router_fitting import Fitted
from wisecli.memory.merging.memory_builder import lookup, matrices, refit, solve_exactly
from wisecli.memory.merging.merge_methods import METHODS, Recipe, merge_deltas
from wisecli.memory.merging.merged_evidence import (
    MergedEvidence,
    read_for_lookup,
    read_merged_evidence,
    separator_of,
    trained_evidence,
)
from wisecli.memory.merging.removal import ReducedShards, solved_anew
from wisecli.models.layout.matrix_site import as_matrix
from wisecli.models.loading import require_base
from wisecli.models.model_files import find_model
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress

EXACT = "exact"
_OF_MATRICES = ("method", "density", "scale", "weights", "refit")
# For shards that no closed form wrote: λ and w.
_PENALTY = Penalty(1e-3, 0.0)
# Keys in many forms fill a matrix, and are left as the solution has them.
_IN_FORMS = (
    "warning: these shards hold edits in many forms, of which one matrix keeps fewer than a lookup; `wise edit "
    "--set in_forms=false` writes them for a matrix that always answers, as with `wise export --format merged`"
)


class Merged(NamedTuple):
    """A memory with its manifest and, where facts decide, how likely prompts mean its edits."""

    manifest: Manifest
    probs: EditProbs | None


class Merger:
    """Shards that are to be merged, checked against each other and their base before any tensor is read.

    Args:
        read: directories that ``wise edit`` wrote, of the same matrix of the same model, without some of their edits.
        model: where the base model is now, if not where the shards say.

    Raises:
        WiseError: the shards, the settings or the base cannot be used.
    """

    def __init__(self, read: Sequence[ReducedShards], settings: MergeSettings, *, model: str | None = None) -> None:
        self.directories = [kept.directory for kept in read if kept.directory.shards]
        if not self.directories:
            raise SettingsError("no edit would be left; delete the memory instead")
        require_same_site(self.directories)
        first = self.directories[0]
        self.settings = resolved(settings, first)
        base = find_model(model or first.model, revision=first.revision)
        self.model = first.model if model is None else str(base.absolute())
        self.checkpoint = Checkpoint(base)
        require_base(base, self.checkpoint, first.site, first.fingerprint)
        if not self.settings.for_lookup:
            as_matrix(first.site)
            _require_solved(read, self.settings)
        self.site = first.site
        self.count = sum(len(directory.shards) for directory in self.directories)
        self.edits = tuple(edit for directory in self.directories for edit in directory.written)

    @property
    def method(self) -> str:
        """The merge method's name, and whether a refit follows."""
        refitted = self.settings.mode == "merge" and self.settings.refit and self.count > 1
        return self.settings.method + ("+refit" if refitted and self.settings.method != EXACT else "")

    @property
    def by_facts(self) -> bool:
        """Whether facts decide, which all shards of the closed form know of."""
        return all(directory.settings["writer"] == "solve" for directory in self.directories)

    @property
    def separator_token_id(self) -> int | None:
        """The token between two answers, if any edits answer in pairs."""
        return separator_of(self.directories)

    @property
    def owners(self) -> tuple[tuple[str, ...], ...]:
        """Ids of the edits of every memory."""
        if self.settings.mode == "retrieve" and not self.by_facts:
            return tuple(entry.edits for directory in self.directories for entry in directory.shards)
        return (tuple(edit.id for edit in self.edits),)

    def _read_lookup(self, on_progress: ProgressCallback) -> MergedEvidence:
        merged_evidence = self._with_prompts(read_for_lookup(self.directories))
        on_progress(Event("merging"))
        return merged_evidence

    def _with_prompts(self, merged_evidence: MergedEvidence) -> MergedEvidence:
        """Check that evidence says what prompts mean, if facts decide, and return it."""
        if self.by_facts and merged_evidence.prompts is None:
            raise SettingsError(
                f"{self.directories[0].path} was written by version 0.1, and does not say what prompts mean; write its "
                "edits anew with `wise edit`"
            )
        return merged_evidence

    def merge(self, on_progress: ProgressCallback = ignore_progress, *, former: FormerMemory | None = None) -> Merged:
        """Return the memory that the shards make, with all that its manifest says; reads shard files and one base
        matrix.

        Args:
            former: a lookup of the first shards by the same settings, if there is one: what it has is taken over.
        """
        first, settings = self.directories[0], self.settings
        on_progress(Event("shards"))
        if settings.for_lookup:
            # No name holds the evidence: the states of prompts are let go before keys are read.
            parts = trained_evidence(self.directories[0 if former is None else former.directories :])
            fitted = lookup(self._read_lookup(on_progress), settings, parts, former)
        else:
            merged_evidence, shards = read_merged_evidence(self.directories)
            own = self._with_prompts(merged_evidence).of_own_prompts()
            on_progress(Event("merging"))
            if any(
                directory.settings.get("in_forms", True)
                for directory in self.directories
                if directory.settings["writer"] == "solve"
            ):
                on_progress(Event(NOTE, note=_IN_FORMS))
            base = self.site.matrix(self.checkpoint)
            try:
                fitted = _in_matrices(self.directories, shards, own, settings, base)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # the stubs leave it out
                raise DamagedFileError(first.path, f"its evidence has no solution ({error})", "edit anew") from None
        manifest = Manifest(
            self.model,
            first.revision,
            first.fingerprint,
            self.site,
            fitted.memory,
            fitted.calibrations,
            self.owners,
            {
                **asdict(settings),
                "shards": [[str(directory.path), len(directory.shards)] for directory in self.directories],
            },
            self.edits,
            versions(),
            tuple(map(origin_of, self.directories)),
        )
        return Merged(manifest, fitted.probs)


def _require_solved(read: Sequence[ReducedShards], settings: MergeSettings) -> None:
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


def _in_matrices(
    directories: Sequence[ShardDirectory],
    shards: Sequence[Shard],
    merged_evidence: MergedEvidence,
    settings: MergeSettings,
    base: Tensor,
) -> Fitted:
    """Return a memory of one merged matrix, or of one for each shard to retrieve from."""
    deltas, chosen = [], []
    for shard in shards:
        values = shard.values
        if values is None:
            values, penalty = solved_anew(shard, merged_evidence.unrelated.tokens)
            chosen.append(penalty)
        deltas.append(shard.mask.dense(values))
    if settings.mode == "retrieve":
        return matrices(torch.stack(deltas), merged_evidence, settings)
    penalty = _penalty(directories, chosen)
    if settings.method == EXACT:
        return matrices(solve_exactly(merged_evidence, penalty)[None], merged_evidence, settings)
    recipe = _recipe(settings, len(shards), base.float())
    merged = merge_deltas(settings.method, torch.stack(deltas), recipe, scale=settings.scale)
    # A single shard has lost nothing that a refit could give back.
    if settings.refit and len(shards) > 1:
        merged = refit(merged, merged_evidence, penalty)
    return matrices(merged[None], merged_evidence, settings)


def _penalty(directories: Sequence[ShardDirectory], chosen: Sequence[Penalty]) -> Penalty:
    """Return the lightest that a shard chose, now or as it was written: more edits in one matrix stand no heavier
    one.
    """
    before = [Penalty(*entry.penalty) for directory in directories for entry in directory.shards if entry.penalty]
    return min([*chosen, *before], key=lambda penalty: (penalty.ridge, penalty.unrelated), default=_PENALTY)


def resolved(settings: MergeSettings, shards: ShardDirectory) -> MergeSettings:
    """Fill in what the shards' own settings decide, and check the rest before anything is read."""
    if settings.method not in METHODS:
        METHODS.load_installed()
    known = (*sorted(METHODS), EXACT)
    if settings.method not in known:
        raise SettingsError(f"--method {settings.method!r} is unknown; choose one of {', '.join(known)}")
    solved = shards.settings["writer"] == "solve"
    whole = replace(
        settings,
        pooling=settings.pooling or shards.settings.get("pooling", "last"),
        norm_of=settings.norm_of or shards.settings.get("norm_of", "update"),
        threshold=settings.threshold or shards.settings["threshold"],
        refit=solved if settings.refit is None else settings.refit,
    )
    if whole.mode is not None:
        return whole
    # To say how matrices are to be merged is to ask for a matrix.
    of_matrices = any(getattr(settings, name) != getattr(MergeSettings, name) for name in _OF_MATRICES)
    return replace(whole, mode="lookup" if solved and not of_matrices else "merge")


def _recipe(settings: MergeSettings, count: int, base: Tensor) -> Recipe:
    weights = settings.weights or (1.0,) * count
    if len(weights) != count:
        raise SettingsError(f"--weights has {len(weights)} numbers for {count} shards; give one a shard")
    return Recipe(torch.tensor(weights), settings.density, base, torch.Generator().manual_seed(settings.seed))
