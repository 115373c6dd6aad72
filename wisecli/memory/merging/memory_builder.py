"""The side memory that stores what shards were asked to store: one matrix, several, or a lookup."""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence
from wisecli.config import MergeSettings
from wisecli.editing.writers.ridge import Penalty, Statistics, solve, statistics
from wisecli.memory.fitting.former_memory import FormerMemory
from wisecli.memory.fitting.router_fitting import Fitted, fit_facts, fit_thresholds
from wisecli.memory.merging.lookup_keys import LookupSource, lookup_keys
from wisecli.memory.merging.merged_evidence import MergedEvidence
from wisecli.memory.merging.pair_tensors import PairTensors
from wisecli.routing.memories.side_memory import SideMemory


def solve_exactly(merged_evidence: MergedEvidence, penalty: Penalty) -> Tensor:
    """Return ``Δ`` (d, d_ff) as if one shard had held all edits, on all columns: statistics of shards add up."""
    return solve(_trained(merged_evidence), penalty, merged_evidence.unrelated.tokens.dense())


def refit(merged: Tensor, merged_evidence: MergedEvidence, penalty: Penalty) -> Tensor:
    """Return the ``Δ`` (d, d_ff) near a merged one that gives every key its residual, on the columns of all masks."""
    used = torch.cat(
        [m.indices if m.kind == "columns" else torch.arange(m.d_ff) for m in merged_evidence.masks]
    ).unique()
    moment = merged_evidence.unrelated.tokens.dense(used)
    return merged.index_copy(1, used, solve(_trained(merged_evidence, used), penalty, moment, around=merged[:, used]))


def _trained(merged_evidence: MergedEvidence, columns: Tensor | None = None) -> Statistics:
    """Return the statistics of all trained keys, shard by shard, on some columns or all."""
    evidence = merged_evidence.evidence
    keys = evidence.keys if columns is None else evidence.keys[:, columns]
    shards = (
        merged_evidence.trained & (merged_evidence.shard == number) for number in range(len(merged_evidence.masks))
    )
    return reduce(add, (statistics(keys[own], evidence.residuals[own]) for own in shards))


def matrices(deltas: Tensor, merged_evidence: MergedEvidence, settings: MergeSettings) -> Fitted:
    """Return a memory of deltas (M, d, d_ff), one for all edits or one a shard, with the router its shards allow."""
    owner = merged_evidence.shard if len(deltas) > 1 else torch.zeros_like(merged_evidence.shard)
    if merged_evidence.prompts is None:
        activated = True if settings.norm_of == "activated" else None
        draft = SideMemory(pack(deltas), (1.0,) * len(deltas), pooling=settings.pooling or "last", activated=activated)
        return fit_thresholds(draft, merged_evidence, owner, settings)
    edit = merged_evidence.evidence.edit.long()
    edit_to_matrix = owner.new_zeros(int(edit.max()) + 1).index_copy(0, edit, owner)
    return fit_facts(SideMemory({**pack(deltas), "edit_to_matrix": edit_to_matrix}, ()), merged_evidence, settings)


def lookup(
    merged_evidence: MergedEvidence,
    settings: MergeSettings,
    parts: Iterable[Evidence] | None = None,
    former: FormerMemory | None = None,
) -> Fitted:
    """Return a lookup that keeps every trained key with its residual; contexts that share a residual keep it once.

    Args:
        parts: what each shard was trained on, if the evidence has no keys and residuals; they are read last.
        former: a lookup of the first shards, if there is one; ``parts`` are then of the other shards.
    """
    trained, token = merged_evidence.evidence.rows(merged_evidence.trained), merged_evidence.separator_token_id
    fitted = fit_facts(SideMemory({}, (), "lookup"), merged_evidence, settings, former)
    merged_evidence = replace(merged_evidence, prompts=None)  # the states of prompts are let go before keys are read
    opened = fitted.memory
    pairs = None if token is None else PairTensors(token, len(opened.thresholds))
    source = LookupSource([trained] if parts is None else parts, trained, pairs)
    keys = lookup_keys(source, merged_evidence.unrelated, settings.strength, former)
    return fitted._replace(memory=replace(opened, tensors={**keys, **opened.tensors}))


def pack(deltas: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a matrix memory: the columns that deltas (M, d, d_ff) touch (M, k), padded with empty
    ones, and ``Δ`` there (M, d, k).
    """
    used = [delta.abs().sum(0).nonzero().flatten() for delta in deltas]
    width = max(1, *(len(columns) for columns in used))
    columns = torch.zeros(len(deltas), width, dtype=torch.long)
    packed = deltas.new_zeros(len(deltas), deltas.shape[1], width)
    for number, touched in enumerate(used):
        columns[number, : len(touched)] = touched
        packed[number, :, : len(touched)] = deltas[number][:, touched]
    return {"columns": columns, "delta": packed}
