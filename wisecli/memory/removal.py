"""Taking edits out of shards: what is left is as if they had never been there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence, Mask, Shard
from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry
from wisecli.editing.ridge import Penalty, solve, statistics
from wisecli.routing.whitening import Moment


@dataclass(frozen=True)
class Kept:
    """A directory of shards as if some of its edits had never been in it.

    ``trained`` names the shards that hold such an edit beside others and were not written in closed form alone: their
    matrices keep it, and only training the other edits anew takes it out.
    """

    directory: ShardDirectory
    trained: tuple[ShardEntry, ...]


def without(directory: ShardDirectory, removed: Collection[str]) -> Kept:
    """What a manifest says of shards but for some edits; shards that held nothing else are left out."""
    gone = set(removed) & {edit.id for edit in directory.written}
    if not gone:
        return Kept(directory, ())
    touched = [entry for entry in directory.shards if gone & set(entry.edits) and set(entry.edits) - gone]
    entries = (
        replace(entry, edits=tuple(name for name in entry.edits if name not in gone)) for entry in directory.shards
    )
    left_out = (*directory.left_out, *(edit.id for edit in directory.written if edit.id in gone))
    kept = replace(directory, shards=tuple(entry for entry in entries if entry.edits), left_out=left_out)
    trained = (entry for entry in touched if entry.penalty is None or entry.losses)
    return Kept(kept, tuple(trained))


def load_without(kept: ShardDirectory, entry: ShardEntry, tokens: Moment) -> Shard:
    """A shard, its edits that the manifest no longer names taken out, and its values solved for anew.

    Args:
        tokens: second moment of unrelated keys.
    """
    shard, names = kept.load(entry), set(entry.edits)
    held = torch.tensor([edit.id in names for edit in kept.edits])
    stays = held[shard.evidence.edit.long()]
    if bool(stays.all()):
        return shard
    evidence = shard.evidence.rows(stays)
    prompts = shard.prompts
    if prompts is not None:
        prompts = prompts.rows(held[prompts.edit.long()])
    if entry.penalty is None:
        return replace(shard, evidence=evidence, prompts=prompts)
    values = solved(shard.mask, evidence, Penalty(*entry.penalty), tokens)
    return Shard(shard.mask, values, evidence, prompts)


def solved(mask: Mask, evidence: Evidence, penalty: Penalty, tokens: Moment) -> Tensor:
    """The values that fill a mask, from what a shard keeps of its edits."""
    fitted = ~evidence.held_out & evidence.own
    known = statistics(mask.restrict(evidence.keys[fitted]), evidence.residuals[fitted])
    whole = solve(known, penalty, tokens.dense(mask.indices if mask.kind == "columns" else None))
    return whole if mask.kind == "columns" else whole.flatten()[mask.indices]
