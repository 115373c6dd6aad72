"""Taking edits out of shards: what is left is as if they had never been there."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence, Mask, Shard
from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry
from wisecli.editing.writers.ridge import PENALTIES, Penalty, Statistics, solve, statistics
from wisecli.routing.memories.whitening import Moment

# By this share must a lighter penalty miss less to be taken.
_WORTH = 0.02


@dataclass(frozen=True)
class ReducedShards:
    """A directory of shards as if some of its edits had never been in it.

    ``trained`` names the shards that hold such an edit beside others and were not written in closed form alone: their
    matrices keep it, and only training the other edits anew takes it out. ``whole`` is the directory as it is.
    """

    directory: ShardDirectory
    trained: tuple[ShardEntry, ...]
    whole: ShardDirectory


def without(directory: ShardDirectory, removed: Collection[str]) -> ReducedShards:
    """Return what a manifest says of shards but for some edits; shards that held nothing else are left out."""
    gone = set(removed) & {edit.id for edit in directory.written}
    if not gone:
        return ReducedShards(directory, (), directory)
    touched = [entry for entry in directory.shards if gone & set(entry.edits) and set(entry.edits) - gone]
    entries = (
        replace(entry, edits=tuple(name for name in entry.edits if name not in gone)) for entry in directory.shards
    )
    left_out = (*directory.left_out, *(edit.id for edit in directory.written if edit.id in gone))
    kept = replace(directory, shards=tuple(entry for entry in entries if entry.edits), left_out=left_out)
    trained = (entry for entry in touched if entry.solved and (entry.penalty is None or entry.losses))
    return ReducedShards(kept, tuple(trained), directory)


def load_without(kept: ShardDirectory, entry: ShardEntry, tokens: Moment) -> Shard:
    """Return a shard without the edits that its manifest no longer names, its values solved for again.

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
    if entry.penalty is None or not entry.solved:
        return replace(shard, evidence=evidence, prompts=prompts)
    values = solved(shard.mask, evidence, Penalty(*entry.penalty), tokens)
    return Shard(shard.mask, values, evidence, prompts)


def solved(mask: Mask, evidence: Evidence, penalty: Penalty, tokens: Moment) -> Tensor:
    """Return the values that fill a mask, from what a shard keeps of its edits."""
    return _within_mask(mask, solve(_statistics(mask, evidence), penalty, _moment(mask, tokens)))


def solved_anew(shard: Shard, tokens: Moment) -> tuple[Tensor, Penalty]:
    """Return the values that fill the mask of a shard without any, and the penalty that they were solved for with.

    It is the heaviest under which keys that are held out get their residuals back as well as under any.
    """
    mask, evidence = shard.mask, shard.evidence
    known, moment = _statistics(mask, evidence), _moment(mask, tokens)
    checked = evidence.held_out & evidence.from_own_prompts
    checked = checked if bool(checked.any()) else evidence.from_own_prompts
    keys, wanted = mask.restrict(evidence.keys[checked]), evidence.residuals[checked]
    best: tuple[float, Tensor, Penalty] | None = None
    for penalty in PENALTIES:
        values = _within_mask(mask, solve(known, penalty, moment))
        missed = float((mask.update(keys, values) - wanted).square().sum())
        if best is None or missed < best[0] * (1 - _WORTH):
            best = missed, values, penalty
    assert best is not None
    return best[1], best[2]


def _statistics(mask: Mask, evidence: Evidence) -> Statistics:
    fitted = ~evidence.held_out & evidence.from_own_prompts
    return statistics(mask.restrict(evidence.keys[fitted]), evidence.residuals[fitted])


def _moment(mask: Mask, tokens: Moment) -> Tensor:
    return tokens.dense(mask.indices if mask.kind == "columns" else None)


def _within_mask(mask: Mask, whole: Tensor) -> Tensor:
    return whole if mask.kind == "columns" else whole.flatten()[mask.indices]
