"""The side memory that stores what shards were asked to store: one matrix, several, or a lookup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence
from wisecli.config import MergeSettings
from wisecli.editing.ridge import Penalty, Statistics, solve, statistics
from wisecli.memory.lookup_keys import lookup_keys
from wisecli.memory.material import Material
from wisecli.memory.router_fitting import Fitted, fit_facts, fit_thresholds
from wisecli.routing.scores import SideMemory


def solve_exactly(material: Material, penalty: Penalty) -> Tensor:
    """``Δ`` (d, d_ff) as if one shard had held all edits, on all columns: statistics of shards add up."""
    return solve(_trained(material), penalty, material.unrelated.tokens.dense())


def refit(merged: Tensor, material: Material, penalty: Penalty) -> Tensor:
    """``Δ`` (d, d_ff) near a merged one that gives every key its residual back, on the columns of all masks."""
    used = torch.cat([m.indices if m.kind == "columns" else torch.arange(m.d_ff) for m in material.masks]).unique()
    moment = material.unrelated.tokens.dense(used)
    return merged.index_copy(1, used, solve(_trained(material, used), penalty, moment, around=merged[:, used]))


def _trained(material: Material, columns: Tensor | None = None) -> Statistics:
    """The statistics of all trained keys, shard by shard, on some columns or all."""
    evidence = material.evidence
    keys = evidence.keys if columns is None else evidence.keys[:, columns]
    shards = (material.trained & (material.shard == number) for number in range(len(material.masks)))
    return reduce(add, (statistics(keys[own], evidence.residuals[own]) for own in shards))


def matrices(deltas: Tensor, material: Material, settings: MergeSettings) -> Fitted:
    """A memory of deltas (M, d, d_ff): one for all edits, or one a shard. What opens it is what its shards know of."""
    owner = material.shard if len(deltas) > 1 else torch.zeros_like(material.shard)
    if material.prompts is None:
        activated = True if settings.norm_of == "activated" else None
        draft = SideMemory(pack(deltas), (1.0,) * len(deltas), pooling=settings.pooling or "last", activated=activated)
        return fit_thresholds(draft, material, owner, settings)
    edit = material.evidence.edit.long()
    holder = owner.new_zeros(int(edit.max()) + 1).index_copy(0, edit, owner)
    return fit_facts(SideMemory({**pack(deltas), "holder": holder}, ()), material, settings)


def lookup(material: Material, settings: MergeSettings, parts: Iterable[Evidence] | None = None) -> Fitted:
    """A memory that keeps every trained key with its residual; a residual that contexts share is kept once.

    Args:
        parts: what each shard was trained on, if the material has no keys and residuals; they are read last.
    """
    trained = material.evidence.rows(material.trained)
    opened, calibrations = fit_facts(SideMemory({}, (), "lookup"), material, settings)
    material = replace(material, prompts=None)
    keys = lookup_keys(
        [trained] if parts is None else parts, trained.edit.long(), material.unrelated, settings.strength
    )
    return replace(opened, tensors={**keys, **opened.tensors}), calibrations


def pack(deltas: Tensor) -> dict[str, Tensor]:
    """The tensors of a matrix memory: the columns that deltas (M, d, d_ff) touch (M, k), padded with empty ones, and
    ``Δ`` there (M, d, k).
    """
    used = [delta.abs().sum(0).nonzero().flatten() for delta in deltas]
    width = max(1, *(len(columns) for columns in used))
    columns = torch.zeros(len(deltas), width, dtype=torch.long)
    packed = deltas.new_zeros(len(deltas), deltas.shape[1], width)
    for number, touched in enumerate(used):
        columns[number, : len(touched)] = touched
        packed[number, :, : len(touched)] = deltas[number][:, touched]
    return {"columns": columns, "delta": packed}
