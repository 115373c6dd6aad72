"""The keys and residuals of a lookup, taken from one shard's evidence after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.shard import BEGUN_CONTEXT, SEPARATOR_CONTEXT, SPACE_CONTEXT, Evidence, half
from wisecli.memory.fitting.former_memory import FormerMemory
from wisecli.memory.merging.pair_tensors import PairTensors
from wisecli.routing.memories.fact_memory import ANSWER_WHITENING
from wisecli.routing.memories.whitening import Moment, whitening

# Keys that are whitened at a time: so many stay near the core.
_AT_A_TIME = 512
# Keys are stored as whole numbers from minus this to this.
_LARGEST = 127


@dataclass(frozen=True)
class Views:
    """Moments by which routing keys are whitened, one for each kind of key.

    Inside an answer the token itself says most of a key, so unrelated text with the same name in it comes much nearer
    than it ever comes to the end of a prompt: those keys have a whitening of their own. So have those that prompts in
    the chat template end in, which are all alike but for what was asked. Keys of a blank that prompts end in are for
    that token alone: they are whitened as keys inside answers are.
    """

    moments: tuple[Moment, ...]
    chatting: bool

    @classmethod
    def of(cls, unrelated: BackgroundStats) -> Views:
        """Return the moments of a base model; the last is for prompts that end in a space."""
        chat = () if unrelated.chatting is None else (unrelated.chatting,)
        return cls((unrelated.wording, unrelated.tokens, *chat, unrelated.tokens), bool(chat))

    def which(self, evidence: Evidence) -> Tensor:
        """Return the index of the moment that whitens each key (n,)."""
        inside = (evidence.position > 0) | (evidence.context == BEGUN_CONTEXT)
        found = inside.long() * ANSWER_WHITENING
        if self.chatting:
            found[evidence.chat & ~inside] = ANSWER_WHITENING + 1
        found[evidence.context == SPACE_CONTEXT] = len(self.moments) - 1
        return found


@dataclass(frozen=True)
class LookupSource:
    """Shards and statistics from which a lookup is made.

    ``parts`` are, of each shard that is not in a former memory, what it was trained on; ``trained`` is the same of all
    shards, where keys and residuals may be missing, with the numbers that edits have among all. ``pairs`` gathers what
    edits need to answer in pairs, if they do.
    """

    parts: Iterable[Evidence]
    trained: Evidence
    pairs: PairTensors | None


def lookup_keys(
    source: LookupSource, unrelated: BackgroundStats, strength: float, former: FormerMemory | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a lookup's keys and residuals, and of its pairs, by their names in a side memory.

    Args:
        strength: how many times a residual is added.
        former: a lookup of the first shards, if there is one, by the same statistics and strength.
    """
    keyed = source.trained.context != SEPARATOR_CONTEXT
    edit, separated = source.trained.edit[keyed].long(), source.trained.edit[~keyed].long()
    keys, residuals, first, separators = _Keys(Views.of(unrelated), edit), _Residuals(strength), 0, 0
    if former is not None:
        first, separators = former.keys, int((separated < former.edits).sum())
        keys.add_former(former.tensors)
        residuals.add_former(former.tensors["residuals"])
        if source.pairs is not None:
            source.pairs.add_former(former.tensors)
    for whole in source.parts:
        # Keys are whitened from where they lie, so what is parted here has none.
        own, chosen = replace(whole, keys=whole.keys[:, :0]), whole.context != SEPARATOR_CONTEXT
        part, ending = own.rows(chosen), own.rows(~chosen)
        rows = slice(first, first + len(part.edit))
        keys.add(first, part, whole.keys, chosen.nonzero().flatten())
        keys.residual[rows] = residuals.add(*_distinct_residuals(part))
        if source.pairs is not None:
            source.pairs.add_answers(part, edit[rows], keys.residual[rows])
            of_edits = separated[separators : separators + len(ending.edit)]
            source.pairs.add_separators(of_edits, residuals.add(*ending.residuals.unique(dim=0, return_inverse=True)))
        first, separators = rows.stop, separators + len(ending.edit)
    return {
        "residuals": residuals.whole(),
        **keys.tensors(),
        **({} if source.pairs is None else source.pairs.tensors(residuals.count)),
    }


class _Keys:
    """The keys of all shards, whitened and quantized to bytes, with the edit and residual of each.

    Args:
        edit: of each, the edit that it is of (n,).
    """

    def __init__(self, views: Views, edit: Tensor) -> None:
        self.edit, count = edit, len(edit)
        self.views, self.whitenings = views, [whitening(moment) for moment in views.moments]
        self.whitened = torch.empty(count, self.whitenings[0].directions.shape[1], dtype=torch.int8)
        self.scales = torch.empty(count)
        self.whitening_index, self.residual = (torch.empty(count, dtype=torch.long) for _ in range(2))
        self.token, self.place = torch.zeros(2, count, dtype=torch.int32)

    def add_former(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the keys of a former lookup, which come first."""
        for name, column in self._columns().items():
            if name in tensors:  # older lookups know nothing of tokens
                column[: len(tensors[name])] = tensors[name]

    def add(self, first: int, part: Evidence, keys: Tensor, rows: Tensor) -> None:
        """Whiten the keys of a part of a shard and store them from ``first`` on, without the residuals that they add.

        Args:
            keys: those of the whole shard (n, d_ff), of which the part has some rows (m,).
        """
        which = self.views.which(part)
        for number in which.unique().tolist():
            for indices in (which == number).nonzero().flatten().split(_AT_A_TIME):
                rounded, scales = _quantized(self.whitenings[number].whitened_keys(keys[rows[indices]].float()))
                self.whitened.index_copy_(0, first + indices, rounded)
                self.scales.index_copy_(0, first + indices, scales)
        own = slice(first, first + len(which))
        self.whitening_index[own] = which
        if part.token is not None:
            told = part.from_own_prompts & _tells_what_follows(part, part.token)
            self.token[own], self.place[own] = (column.where(told, 0).int() for column in (part.token, part.position))

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, with the whitenings that are used, by names in a side memory."""
        columns, used = self._columns(), self.whitenings
        if not bool(self.place.any()):  # older shards do not say at which tokens keys were read
            del columns["key_to_token"], columns["key_to_place"]
        if not bool((self.whitening_index == len(used) - 1).any()):  # no prompt ends in a blank
            used = used[:-1]
        return {
            **columns,
            # Of few keys less is known; where nothing is, nothing is gained.
            "directions": pad_sequence([basis.directions for basis in used], batch_first=True),
            "gains": pad_sequence([basis.gains for basis in used], batch_first=True),
            "floors": torch.tensor([basis.floor for basis in used]),
        }

    def _columns(self) -> dict[str, Tensor]:
        """Return the tensors that have a row for each key."""
        return {
            "key_to_residual": self.residual,
            "whitened_keys": self.whitened,
            "key_scales": self.scales,
            "cosine_offset": torch.zeros(len(self.edit)),
            "key_to_edit": self.edit,
            "whitening_index": self.whitening_index,
            "key_to_token": self.token,
            "key_to_place": self.place,
        }


def _tells_what_follows(evidence: Evidence, token: Tensor) -> Tensor:
    """Return for which keys (n,) all answers of their edit with the same token at the same place go on alike.

    Args:
        token: that of each key (n,).
    """
    position = evidence.position.long()
    width = int(position.max()) + 2
    place = evidence.answer * width + position
    # Of every place of an answer the token there; none behind its last one.
    at_place = torch.full((int(place.max()) + 2,), -1).index_copy(0, place, token.long())
    following = at_place[place + 1]
    same = torch.stack([evidence.edit.long(), position, token.long()], 1).unique(dim=0, return_inverse=True)[1]
    least, most = (
        torch.zeros(int(same.max()) + 1, dtype=torch.long).scatter_reduce(
            0, same, following, reduce, include_self=False
        )
        for reduce in ("amin", "amax")
    )
    return (least == most)[same]


def _quantized(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (n, d_ff) in whole numbers of one byte, and the unit of each key's numbers (n,).

    Rounding moves the cosine of a key with another by .0004 on average.
    """
    scales = (keys.abs().amax(1) / _LARGEST).clamp(min=torch.finfo(keys.dtype).tiny)
    return (keys / scales[:, None]).round().to(torch.int8), scales


class _Residuals:
    """The residuals of all shards, one after the other, at the strength that they are served with."""

    def __init__(self, strength: float) -> None:
        self.strength, self.count, self.parts = strength, 0, list[Tensor]()

    def add_former(self, residuals: Tensor) -> None:
        """Copy residuals (m, d) that are at that strength already."""
        self.parts.append(residuals)
        self.count += len(residuals)

    def add(self, residuals: Tensor, index: Tensor) -> Tensor:
        """Append residuals (m, d); return the indices among all residuals (n,) of those at indices (n,) of the new
        ones.
        """
        self.parts.append(half(self.strength * residuals.float()))
        self.count += len(residuals)
        return index + self.count - len(residuals)

    def whole(self) -> Tensor:
        """Return all of them."""
        return torch.cat(self.parts)


def _distinct_residuals(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the residuals (m, d), each once, and which of them each key adds (n,): contexts share an answer's."""
    place = evidence.answer * (int(evidence.position.max()) + 1) + evidence.position
    _, index = place.unique(return_inverse=True)
    residuals = evidence.residuals.new_zeros(int(index.max()) + 1, evidence.residuals.shape[1])
    residuals.index_copy_(0, index, evidence.residuals)
    others = (residuals[index] != evidence.residuals).any(1)
    if bool(others.any()):  # what is trained, or added to a prompt's own keys, differs between contexts
        index[others] = torch.arange(int(others.sum())) + len(residuals)
        residuals, number = torch.cat([residuals, evidence.residuals[others]]).unique(dim=0, return_inverse=True)
        index = number[index]
    return residuals, index
