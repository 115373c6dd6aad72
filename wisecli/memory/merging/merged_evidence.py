"""What shards bring to a memory: their evidence as one, and the tensors that it is merged from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.shard import FIRST_TOKEN_FORM, Evidence, Mask, PromptStates, Shard, evidence_in, prompts_in
from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry
from wisecli.edits.record import Edit
from wisecli.io.safe_paths import inside
from wisecli.io.safetensors_header import read_header
from wisecli.memory.merging.removal import load_without
from wisecli.routing.memories.subject_tensors import Spellings

_LARGE = ("evidence.keys", "evidence.residuals", "delta.values")
_STATES = "prompts.states"


@dataclass(frozen=True)
class MergedEvidence:
    """All that shards know of their edits.

    ``evidence`` numbers the edits of all shards through; ``shard`` (n,) says which shard each of its keys is of.
    ``subjects`` are the words of every edit's subject, none for one that its own prompt does not name, and
    ``subject_tokens`` the tokens that it is written with. ``prompts`` are the states of edits' prompts, if all shards
    keep them. ``separator_token_id`` is the token between two answers, if any edits answer in pairs; ``edits`` are the
    edits by their numbers.
    """

    evidence: Evidence
    shard: Tensor
    masks: tuple[Mask, ...]
    unrelated: BackgroundStats
    subjects: tuple[Spellings, ...] = ()
    prompts: PromptStates | None = None
    subject_tokens: tuple[tuple[int, ...], ...] = ()
    separator_token_id: int | None = None
    edits: tuple[Edit, ...] = ()

    @property
    def trained(self) -> Tensor:
        """Which keys of the evidence were trained on (n,); the others are of contexts held back for calibration."""
        return ~self.evidence.held_out

    def of_own_prompts(self) -> MergedEvidence:
        """Return the evidence without keys that no prompt of an edit gave."""
        own = self.evidence.from_own_prompts
        return replace(self, evidence=self.evidence.rows(own), shard=self.shard[own])


def read_merged_evidence(directories: Sequence[ShardDirectory]) -> tuple[MergedEvidence, list[Shard]]:
    """Return the evidence of all shards of some directories, and the shards themselves, in order.

    Raises:
        DamagedFileError: a shard's file cannot be used.
    """
    unrelated = _unrelated_of(directories)
    shards = [load_without(directory, entry, unrelated.tokens) for directory, entry in _entries(directories)]
    places, subjects, tokens = _edit_numbers(directories), *_subjects(directories)
    joined = _JoinedPrompts(sum(len(shard.prompts.edit) for shard in shards if shard.prompts is not None))
    for shard, place in zip(shards, places, strict=True):
        joined.add(shard.prompts, place)
    parts, masks = [shard.evidence for shard in shards], tuple(shard.mask for shard in shards)
    return MergedEvidence(
        *(join_evidence(parts, places), _shard_numbers(parts), masks, unrelated, subjects, joined.whole(), tokens),
        edits=_written(directories),
    ), shards


def read_for_lookup(directories: Sequence[ShardDirectory]) -> MergedEvidence:
    """Return the evidence of all shards of some directories without what takes most room, keys and residuals: (n, 0)
    each.

    The states of prompts are in half precision, where they are stored so.

    Raises:
        DamagedFileError: a shard's file cannot be used.
    """
    parts, places, joined = [], _edit_numbers(directories), _JoinedPrompts(_prompt_tokens(directories))
    for (directory, entry), place in zip(_entries(directories), places, strict=True):
        tensors = directory.tensors(entry, lambda name: name not in _LARGE)
        nothing = {name: torch.empty(len(tensors["evidence.edit"]), 0) for name in _LARGE[:2]}
        parts.append(
            evidence_in(directory.path / entry.file, {**tensors, **nothing}).rows(
                _rows_held(directory, entry, tensors["evidence.edit"])
            )
        )
        joined.add(_prompts_held(directory, entry, tensors), place)
    subjects, tokens = _subjects(directories)
    evidence, unrelated = join_evidence(parts, places), _unrelated_of(directories)
    numbered, separator = _shard_numbers(parts), separator_of(directories)
    return MergedEvidence(
        *(evidence, numbered, (), unrelated, subjects, joined.whole(), tokens, separator), _written(directories)
    )


def separator_of(directories: Sequence[ShardDirectory]) -> int | None:
    """Return the token between two answers, if any edits of some shards answer in pairs."""
    return next(
        (directory.separator_token_id for directory in directories if directory.separator_token_id is not None), None
    )


class _JoinedPrompts:
    """The states of shards' prompts in one place, so that there are never two of each; those of first tokens come last.

    Args:
        room: how many tokens there are at most.
    """

    def __init__(self, room: int) -> None:
        self.room, self.count, self.missing = room, 0, False
        self.states: Tensor | None = None
        self.compared: list[PromptStates] = []
        self.first: list[PromptStates] = []

    def add(self, part: PromptStates | None, edits: Tensor) -> None:
        """Add the states of one shard's prompts, if it keeps them.

        Args:
            edits: the number in the whole of each edit that the shard's manifest lists.
        """
        if part is None:
            self.missing = True
            return
        part = replace(part, edit=edits[part.edit.long()])
        first = part.form >= FIRST_TOKEN_FORM
        self.first.append(part.rows(first))
        self.compared.append(self._put(part, (~first).nonzero().flatten()))

    def whole(self) -> PromptStates | None:
        """Return all of them, if every shard keeps them."""
        if self.missing:
            return None
        first = (self._put(part, torch.arange(len(part.edit))) for part in self.first)
        rest = PromptStates.joined([*self.compared, *first])
        return rest if self.states is None else replace(rest, states=self.states[: self.count])

    def _put(self, part: PromptStates, rows: Tensor) -> PromptStates:
        """Store the states of some rows (m,) and return the rows without them."""
        if self.states is None:
            self.states = part.states.new_empty(self.room, part.states.shape[1])
        dtype = torch.promote_types(self.states.dtype, part.states.dtype)
        self.states = self.states.to(dtype)
        torch.index_select(part.states.to(dtype), 0, rows, out=self.states[self.count : self.count + len(rows)])
        self.count += len(rows)
        return replace(part, states=part.states[:, :0]).rows(rows)


def _prompt_tokens(directories: Sequence[ShardDirectory]) -> int:
    """Return how many tokens of prompts the shard files hold."""
    headers = (read_header(inside(directory.path, entry.file)) for directory, entry in _entries(directories))
    return sum(header.tensors[_STATES].shape[0] for header in headers if _STATES in header.tensors)


def trained_evidence(directories: Sequence[ShardDirectory]) -> Iterator[Evidence]:
    """Yield what each shard was trained on, one after the other, as it is stored; edits are numbered as each manifest
    does.
    """
    for directory, entry in _entries(directories):
        tensors = replace(directory, files_checked=True).tensors(entry, lambda name: name.startswith("evidence."))
        evidence = evidence_in(directory.path / entry.file, tensors)
        held = _rows_held(directory, entry, evidence.edit) & ~evidence.held_out
        yield evidence.rows(held.nonzero().flatten())


def _entries(directories: Sequence[ShardDirectory]) -> list[tuple[ShardDirectory, ShardEntry]]:
    return [(directory, entry) for directory in directories for entry in directory.shards]


def _rows_held(directory: ShardDirectory, entry: ShardEntry, edit: Tensor) -> Tensor:
    """Return which rows of a shard are of edits (n,) that its manifest still names (n,)."""
    names, (numbers, index) = set(entry.edits), edit.long().unique(return_inverse=True)
    return torch.tensor([directory.edits[number].id in names for number in numbers.tolist()], dtype=torch.bool)[index]


def _prompts_held(directory: ShardDirectory, entry: ShardEntry, tensors: Mapping[str, Tensor]) -> PromptStates | None:
    """Return the states of a shard's prompts that its manifest still names, if it keeps any; not copied if all are."""
    prompts = prompts_in(tensors)
    if prompts is None:
        return None
    held = _rows_held(directory, entry, prompts.edit)
    return prompts if bool(held.all()) else prompts.rows(held)


def _shard_numbers(parts: Sequence[Evidence]) -> Tensor:
    """Return the number of the shard that each key is of (n,)."""
    return torch.cat([torch.full((len(part.edit),), index) for index, part in enumerate(parts)])


def _written(directories: Sequence[ShardDirectory]) -> tuple[Edit, ...]:
    """Return the edits that shards were written of, in order."""
    return tuple(edit for directory in directories for edit in directory.written)


def _subjects(directories: Sequence[ShardDirectory]) -> tuple[tuple[Spellings, ...], tuple[tuple[int, ...], ...]]:
    """Return the words of every edit's subject, and its tokens."""
    written = [(directory, edit.id) for directory in directories for edit in directory.written]
    subjects = tuple(directory.subjects.get(name, ()) for directory, name in written)
    return subjects, tuple(directory.subject_tokens.get(name, ()) for directory, name in written)


def _edit_numbers(directories: Sequence[ShardDirectory]) -> list[Tensor]:
    """Return, for each shard, the number among all written edits of each edit that its manifest lists."""
    places: list[Tensor] = []
    before = 0
    for directory in directories:
        gone = set(directory.left_out)
        kept = torch.tensor([edit.id not in gone for edit in directory.edits])
        places += [kept.cumsum(0) - 1 + before] * len(directory.shards)
        before += int(kept.sum())
    return places


def _unrelated_of(directories: Sequence[ShardDirectory]) -> BackgroundStats:
    """Return the background statistics of all directories; what several have in common counts once."""
    read = list({directory.unrelated_sha256: directory.load_unrelated() for directory in directories}.values())
    keys, chat = (torch.cat([getattr(stats, name) for stats in read]) for name in ("keys", "chat"))
    chatting = next((stats.chatting for stats in read if stats.chatting is not None), None)
    letters = next((stats.token_characters for stats in read if stats.token_characters is not None), None)
    return replace(read[0], keys=keys, chat=chat, chatting=chatting, token_characters=letters)


def join_evidence(parts: Sequence[Evidence], places: Sequence[Tensor]) -> Evidence:
    """Return the evidence of several shards as one.

    Args:
        places: for each shard, the number that each of its edits has in the whole.
    """
    counted = [replace(part, edit=place[part.edit.long()]) for part, place in zip(parts, places, strict=True)]
    return Evidence.joined(counted)
