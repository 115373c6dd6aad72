"""What shards bring to a memory: their evidence as one, and the tensors that it is merged from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence, Mask, PromptStates, Shard
from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.artifacts.unrelated_stats import BackgroundStats
from wisecli.memory.removal import load_without
from wisecli.routing.subject_names import Spellings


@dataclass(frozen=True)
class Material:
    """All that shards know of their edits.

    ``evidence`` numbers the edits of all shards through; ``shard`` (n,) says which shard each of its keys is of.
    ``subjects`` are the words of every edit's subject, none for one that its own prompt does not name, and
    ``subject_tokens`` the tokens that it is written with. ``prompts`` are the states of edits' prompts, if all shards
    keep them.
    """

    evidence: Evidence
    shard: Tensor
    masks: tuple[Mask, ...]
    unrelated: BackgroundStats
    subjects: tuple[Spellings, ...] = ()
    prompts: PromptStates | None = None
    subject_tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def trained(self) -> Tensor:
        """Which keys of the evidence were trained on (n,); the others are of contexts held back for calibration."""
        return ~self.evidence.held_out

    def of_own_prompts(self) -> Material:
        """The material without keys that no prompt of an edit gave."""
        own = self.evidence.own
        return replace(self, evidence=self.evidence.rows(own), shard=self.shard[own])


def read_material(directories: Sequence[ShardDirectory]) -> tuple[Material, list[Shard]]:
    """The material of all shards of some directories, and the shards themselves, in order.

    Raises:
        DamagedFileError: a shard's file cannot be used.
    """
    unrelated = _unrelated_of(directories)
    pairs = [(directory, entry) for directory in directories for entry in directory.shards]
    shards = [load_without(directory, entry, unrelated.tokens) for directory, entry in pairs]
    places = _places(directories)
    evidence = join([shard.evidence for shard in shards], places)
    number = torch.cat([torch.full((len(shard.evidence.edit),), index) for index, shard in enumerate(shards)])
    written = [(directory, edit.id) for directory in directories for edit in directory.written]
    subjects = tuple(directory.subjects.get(name, ()) for directory, name in written)
    tokens = tuple(directory.subject_tokens.get(name, ()) for directory, name in written)
    masks = tuple(shard.mask for shard in shards)
    return Material(evidence, number, masks, unrelated, subjects, _prompts(shards, places), tokens), shards


def _prompts(shards: Sequence[Shard], places: Sequence[Tensor]) -> PromptStates | None:
    """The states of all edits' prompts, with the numbers that their edits have in the whole."""
    kept = [shard.prompts for shard in shards if shard.prompts is not None]
    if len(kept) < len(shards):
        return None
    counted = [replace(part, edit=place[part.edit.long()]) for part, place in zip(kept, places, strict=True)]
    return PromptStates.joined(counted)


def _places(directories: Sequence[ShardDirectory]) -> list[Tensor]:
    """For each shard, the number among all written edits of each edit that its manifest lists."""
    places: list[Tensor] = []
    before = 0
    for directory in directories:
        gone = set(directory.left_out)
        kept = torch.tensor([edit.id not in gone for edit in directory.edits])
        places += [kept.cumsum(0) - 1 + before] * len(directory.shards)
        before += int(kept.sum())
    return places


def _unrelated_of(directories: Sequence[ShardDirectory]) -> BackgroundStats:
    """The background statistics of all directories; what several have in common counts once."""
    read = list({directory.unrelated_sha256: directory.load_unrelated() for directory in directories}.values())
    keys, chat = (torch.cat([getattr(one, name) for one in read]) for name in ("keys", "chat"))
    chatting = next((one.chatting for one in read if one.chatting is not None), None)
    letters = next((one.letters for one in read if one.letters is not None), None)
    return replace(read[0], keys=keys, chat=chat, chatting=chatting, letters=letters)


def join(parts: Sequence[Evidence], places: Sequence[Tensor]) -> Evidence:
    """The evidence of several shards as one.

    Args:
        places: for each shard, the number that each of its edits has in the whole.
    """
    counted = [replace(part, edit=place[part.edit.long()]) for part, place in zip(parts, places, strict=True)]
    return Evidence.joined(counted)
