"""The routing rule: which memory answers a prompt, and what it adds at a token. Needs torch only; exports carry this.

    decide(window)                   which memory answers a prompt, or none: a function of the prompt's window of tokens
    residual(memory, key, inside)    of that memory, what is added at one token: a function of that token's key
    token_choices(key)               token routing: each token decides by itself (WISE, equations 3 and 6)

A window is run by itself through the layers up to where it is read (:mod:`.prompts`), so a decision depends on token
ids alone. It is made

    by meaning     from the states of all its tokens, by late interaction (:mod:`.meaning`), names (:mod:`.names`) and
                   what it wants with what it mentions (:mod:`.request_gate`)
    sequence       from the key of its last token
    mean           from the mean of the scores of all its tokens, as in the code of the paper's authors

Calibration, evaluation, ``wise explain`` and the routed model ask these functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .meaning import Asked, looked_at, marked_first, said_before
from .prompts import UNROUTED, last_marked
from .request_gate import mention_in, padded
from .scores import REACH, MemoryScores

# How likely a prompt must be to ask an edit that it means. What the gate says was shifted so that nearly all made-up
# questions are above this.
_ASKED = 0.5


@dataclass(frozen=True)
class Reading:
    """What a model makes of windows of B prompts: ``ids`` (B, W), and which of them are no padding, ``real`` (B, W).

    ``states`` (B, W, d) are those that leave the layer that a memory reads, or the inputs of the edited matrix
    (B, W, d_ff) for a memory that reads none.
    """

    ids: Tensor
    real: Tensor
    states: Tensor


@dataclass(frozen=True)
class Decision:
    """Which memory answers each of B prompts, and why.

    ``memory`` (B,) is its number, ``UNROUTED`` for none. ``strength`` (B,) is the best score as a multiple of its
    threshold, ``nearest`` (B,) the memory that has it. By meaning, ``sure`` (B, M) is how surely prompts mean each
    edit, ``named`` (B, M) marks the edits whose subjects they name, and ``asked`` (B,) is how surely they ask what they
    mean, 0 where they mean nothing; ``None`` where that has no say.
    """

    memory: Tensor
    strength: Tensor
    nearest: Tensor
    sure: Tensor | None = None
    named: Tensor | None = None
    asked: Tensor | None = None


def decide(memory: MemoryScores, reading: Reading) -> Decision:
    """Decide which memory answers each prompt."""
    if memory.meaning is not None:
        return _by_meaning(memory, reading)
    if memory.routing == "mean":
        strength, nearest = _by_mean(memory, reading)
        named = None
    else:
        end = last_marked(reading.real).clamp(min=0)
        keys = reading.states[torch.arange(len(end), device=end.device), end]
        named = None if memory.names is None else memory.names(reading.ids, reading.real)
        strength, place = memory.nearest(keys, named)
        nearest = memory.memory_at(place)
    chosen = nearest.where((strength > 1) & reading.real.any(1), UNROUTED)
    return Decision(chosen, strength, nearest, named=named)


def _by_meaning(memory: MemoryScores, reading: Reading) -> Decision:
    """The edit that a prompt means most surely of those whose subjects it names, be it with a slip.

    Where the last turn alone means none, those before it may say about whom it asks, or what.
    """
    assert memory.meaning is not None, "the caller has looked"
    ids, real = reading.ids, reading.real
    first = torch.zeros_like(real)
    first[:, 0] = real[:, 0]
    last = looked_at(ids, real, first, memory.meaning.breaks)
    read = memory.meaning.read(reading.states, last)
    # Attention rests on the first token of all, which may be of the name none the less.
    spelt = looked_at(ids, real, torch.zeros_like(real), memory.meaning.breaks)
    found = _meant(memory, reading, memory.meaning.of(read).float(), real, spelt)
    if memory.request is None:
        return found
    found = _if_asked(memory, read, found)
    before = said_before(ids, real, last, memory.meaning.breaks)
    rows = ((found.strength <= 1) & before.any(1)).nonzero().flatten()
    if not len(rows):
        return found
    some = Reading(ids[rows], real[rows], reading.states[rows])
    return _put(found, rows, _carried(memory, some, last[rows], before[rows]))


def _meant(memory: MemoryScores, reading: Reading, sure: Tensor, told: Tensor, spelt: Tensor) -> Decision:
    """The edit that prompts mean most surely, of those that they name.

    Args:
        sure: how surely prompts mean each edit (B, M).
        told: the tokens that may name its subject (B, T).
        spelt: those that may name it with a slip (B, T).
    """
    named, meant = None, sure
    if memory.names is not None:
        named = memory.names(reading.ids, told)
        if memory.spelling is not None:
            letters = memory.spelling.read(reading.ids, spelt)
            named = named | memory.spelling(letters, memory.beyond(sure) & ~named)
        meant = sure * named
    strength, nearest = memory.strongest(meant)
    chosen = nearest.where((strength > 1) & reading.real.any(1), UNROUTED)
    return Decision(chosen, strength, nearest, sure, named)


def _carried(memory: MemoryScores, reading: Reading, last: Tensor, before: Tensor) -> Decision:
    """What prompts ask that their last turn says in part, and the turns of the same role before it the rest.

    Args:
        last, before: the tokens of the last turn and of those (B, T).
    """
    assert memory.meaning is not None, "the caller has looked"
    told = last | before
    read = memory.meaning.read(reading.states, told)
    own = last.gather(1, marked_first(told)[0])
    sure = memory.meaning.of(read, own).float()
    return _if_asked(memory, read, _meant(memory, reading, sure, told, told), ~own)


def _put(found: Decision, rows: Tensor, some: Decision) -> Decision:
    """A decision in which other ones stand for those rows of it that they open."""
    opened = some.memory != UNROUTED
    rows = rows[opened]
    parts: dict[str, Any] = {}
    for name in Decision.__dataclass_fields__:
        whole, part = getattr(found, name), getattr(some, name)
        parts[name] = whole if whole is None else whole.index_copy(0, rows, part[opened])
    return Decision(**parts)


def _if_asked(memory: MemoryScores, read: Asked, found: Decision, earlier: Tensor | None = None) -> Decision:
    """A decision without the edits that prompts mention and do not ask.

    Args:
        read: what is compared of the prompts.
        earlier: which of its tokens are of turns before the last one (B, W).
    """
    assert memory.meaning is not None and memory.request is not None, "the caller has looked"
    asked = torch.zeros(len(found.memory), device=found.memory.device)
    rows = (found.memory != UNROUTED).nonzero().flatten()
    if len(rows):
        mentions = []
        for row, edit in zip(rows.tolist(), found.memory[rows].tolist(), strict=True):
            there, own = read.there[row], memory.meaning.tokens_of(edit)
            marks = None if earlier is None else earlier[row, there]
            mentions.append(mention_in(read.states[row, there], read.turned[:, row, there], *own, marks))
        asked[rows] = memory.request(padded(mentions), found.memory[rows]).sigmoid()
    return replace(found, memory=found.memory.where(asked > _ASKED, UNROUTED), asked=asked)


def _by_mean(memory: MemoryScores, reading: Reading) -> tuple[Tensor, Tensor]:
    """The memory that prompts call most strongly of those called beyond their thresholds, by what factor: two (B,).

    If none is, the one nearest to that.
    """
    weights = reading.real / reading.real.sum(1, keepdim=True).clamp(min=1)
    called = torch.einsum("btm,bt->bm", memory.scores(reading.states).float(), weights)
    factor, nearest = memory.strongest(called)
    if called.shape[-1] == 1:
        return factor, nearest
    beyond = called / called.new_tensor(memory.thresholds)
    most = called.where(beyond > 1, -torch.inf).argmax(-1)
    chosen = most.where(factor > 1, nearest)
    return beyond.gather(-1, chosen[:, None])[:, 0], chosen


@dataclass(frozen=True)
class TokenChoices:
    """What answers tokens (...): ``chosen`` is a memory, or of a lookup one of its keys; ``UNROUTED`` where none does.

    ``strength`` is the best score there as a multiple of its threshold, and ``nearest`` what has it.
    """

    chosen: Tensor
    strength: Tensor
    nearest: Tensor


def token_choices(memory: MemoryScores, keys: Tensor) -> TokenChoices:
    """What answers each token by itself: keys (..., d_ff)."""
    strength, nearest = memory.nearest(keys)
    return TokenChoices(nearest.where(strength > 1, UNROUTED), strength, nearest)


def forced_choice(memory: MemoryScores, keys: Tensor, forced: Tensor) -> Tensor:
    """The memory that is to answer tokens (...), or of a lookup the nearest of its keys, whatever that is for: (...).

    Args:
        keys: inputs of the matrix (..., d_ff).
        forced: a memory for each token (...).
    """
    if memory.kind != "lookup":
        return forced
    return memory.cosines(keys).masked_fill(memory.owner != forced[..., None], -torch.inf).argmax(-1)


def residual(memory: MemoryScores, keys: Tensor, answered: Tensor, inside: Tensor) -> TokenChoices:
    """What a decided memory adds at tokens: of a lookup, which of the decided edit's own keys is nearest.

    Behind a prompt's last token a lookup's key must come near one of those, or the answer is over.

    Args:
        keys: inputs of the matrix (B, T, d_ff).
        answered: the memory that answers each token (B, T), ``UNROUTED`` for none.
        inside: whether a token comes after its prompt's last one (B, T).
    """
    strength = torch.zeros(answered.shape, device=keys.device)
    if memory.kind != "lookup":
        return TokenChoices(answered, strength, answered)
    nearest = torch.full_like(answered, UNROUTED)
    chosen = nearest.clone()
    rows, columns = (answered != UNROUTED).nonzero(as_tuple=True)
    if len(rows):
        within = inside[rows, columns]
        cosine, place = memory.of_edits(keys[rows, columns], answered[rows, columns], within)
        nearest[rows, columns] = place
        chosen[rows, columns] = place.where(~within | (cosine > REACH), UNROUTED)
        strength[rows, columns] = cosine / REACH
    return TokenChoices(chosen, strength, nearest)
