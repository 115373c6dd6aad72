"""The keys and residuals of a lookup, taken from one shard's evidence after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.shard import BEGUN_CONTEXT, SEPARATOR_CONTEXT, SPACE_CONTEXT, Evidence, half
from wisecli.memory.merging.pair_tensors import PairTensors
from wisecli.routing.memories.fact_memory import ANSWER_WHITENING
from wisecli.routing.memories.whitening import Moment, whitening

# Keys that are whitened at a time: so many stay near the core.
_AT_A_TIME = 512
# Keys are stored as whole numbers from minus this to this.
_LARGEST = 127


@dataclass(frozen=True)
class Views:
    """The moments by which routing keys are whitened.

    Inside an answer the token itself says most of a key, so unrelated text with the same name in it comes much nearer
    than it ever comes to the end of a prompt: those keys have a whitening of their own. So have those that prompts in
    the chat template end in, which are all alike but for what was asked. Keys of a blank that prompts end in are for
    that token alone: they are whitened as keys inside answers are.
    """

    moments: tuple[Moment, ...]
    chatting: bool

    @classmethod
    def of(cls, unrelated: BackgroundStats) -> Views:
        """Return those of a base model; the last is for blanks that prompts end in."""
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
    """What a lookup is made of.

    ``parts`` are, of each shard, what it was trained on; ``trained`` is the same of all shards,
    where keys and residuals may be missing, with the numbers that edits have among all. ``pairs`` gathers what edits
    need to answer in pairs, if they do.
    """

    parts: Iterable[Evidence]
    trained: Evidence
    pairs: PairTensors | None


def lookup_keys(source: LookupSource, unrelated: BackgroundStats, strength: float) -> dict[str, Tensor]:
    """Return the tensors of a lookup's keys and residuals, and of its pairs, by their names in a side memory.

    Args:
        strength: how many times a residual is added.
    """
    views = Views.of(unrelated)
    whitenings = [whitening(moment) for moment in views.moments]
    keyed = source.trained.context != SEPARATOR_CONTEXT
    edit, separated = source.trained.edit[keyed].long(), source.trained.edit[~keyed].long()
    count, first, separators = len(edit), 0, 0
    whitened_keys = torch.empty(count, whitenings[0].directions.shape[1], dtype=torch.int8)
    key_scales = torch.empty(count)
    whitening_index, key_to_residual = torch.empty_like(edit), torch.empty_like(edit)
    residuals = _Residuals(strength)
    for whole in source.parts:
        # Keys are whitened from where they lie, so what is parted here has none.
        own, chosen = replace(whole, keys=whole.keys[:, :0]), whole.context != SEPARATOR_CONTEXT
        part, ending = own.rows(chosen), own.rows(~chosen)
        rows, which, place = slice(first, first + len(part.edit)), views.which(part), chosen.nonzero().flatten()
        for number in which.unique().tolist():
            for some in (which == number).nonzero().flatten().split(_AT_A_TIME):
                rounded, scales = _in_bytes(whitenings[number].whitened_keys(whole.keys[place[some]].float()))
                whitened_keys.index_copy_(0, first + some, rounded)
                key_scales.index_copy_(0, first + some, scales)
        whitening_index[rows] = which
        key_to_residual[rows] = residuals.add(*_distinct_residuals(part))
        if source.pairs is not None:
            source.pairs.add_answers(part, edit[rows], key_to_residual[rows])
            of_edits = separated[separators : separators + len(ending.edit)]
            source.pairs.add_separators(of_edits, residuals.add(*ending.residuals.unique(dim=0, return_inverse=True)))
        first, separators = rows.stop, separators + len(ending.edit)
    if not bool((whitening_index == len(whitenings) - 1).any()):  # no prompt ends in a blank
        whitenings.pop()
    return {
        "residuals": residuals.whole(),
        "key_to_residual": key_to_residual,
        "whitened_keys": whitened_keys,
        "key_scales": key_scales,
        "cosine_offset": torch.zeros(count),
        "key_to_edit": edit,
        "whitening_index": whitening_index,
        # Of few keys less is known; where nothing is, nothing is gained.
        "directions": pad_sequence([one.directions for one in whitenings], batch_first=True),
        "gains": pad_sequence([one.gains for one in whitenings], batch_first=True),
        "floors": torch.tensor([one.floor for one in whitenings]),
        **({} if source.pairs is None else source.pairs.tensors(residuals.count)),
    }


def _in_bytes(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (n, d_ff) in whole numbers of one byte, and the unit of each key's numbers (n,).

    Rounding moves the cosine of a key with another by .0004 on average.
    """
    scales = (keys.abs().amax(1) / _LARGEST).clamp(min=torch.finfo(keys.dtype).tiny)
    return (keys / scales[:, None]).round().to(torch.int8), scales


class _Residuals:
    """The residuals of all shards, one behind the other, at the strength that they are served with."""

    def __init__(self, strength: float) -> None:
        self.strength, self.count, self.parts = strength, 0, list[Tensor]()

    def add(self, residuals: Tensor, index: Tensor) -> Tensor:
        """Take in some residuals (m, d); returns what indices of those (n,) are among all (n,)."""
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
