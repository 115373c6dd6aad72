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

from dataclasses import dataclass

import torch
from torch import Tensor

from .meaning import Asked, Meaning, looked_at
from .prompts import UNROUTED, last_marked
from .request_gate import RequestGate, mention_in, padded
from .scores import REACH, MemoryScores

# How likely a prompt must be to ask an edit that it means. Below this more mentions open it, above it rephrases in
# conversations are lost: `benchmarks/asking.py` has both at several values.
_ASKED = 0.15


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
    """The edit that a prompt means most surely of those whose subjects it names, be it with a slip."""
    assert memory.meaning is not None, "the caller has looked"
    ids, real = reading.ids, reading.real
    first = torch.zeros_like(real)
    first[:, 0] = real[:, 0]
    breaks = memory.meaning.breaks
    read = memory.meaning.read(reading.states, looked_at(ids, real, first, breaks))
    sure = memory.meaning.of(read).float()
    named, meant = None, sure
    if memory.names is not None:
        named = memory.names(ids, real)
        if memory.spelling is not None:
            # Attention rests on the first token of all, which may be of the name none the less.
            letters = memory.spelling.read(ids, looked_at(ids, real, torch.zeros_like(real), breaks))
            named = named | memory.spelling(letters, memory.beyond(sure) & ~named)
        meant = sure * named
    strength, nearest = memory.strongest(meant)
    chosen = nearest.where((strength > 1) & real.any(1), UNROUTED)
    if memory.request is None:
        return Decision(chosen, strength, nearest, sure, named)
    asked = _asked(memory.meaning, memory.request, read, chosen)
    return Decision(chosen.where(asked > _ASKED, UNROUTED), strength, nearest, sure, named, asked)


def _asked(meaning: Meaning, gate: RequestGate, read: Asked, chosen: Tensor) -> Tensor:
    """How surely prompts ask the edit that they mean (B,); 0 for those that mean none.

    Args:
        chosen: the edit that each means, ``UNROUTED`` for none (B,).
    """
    asked = torch.zeros(len(chosen), device=chosen.device)
    rows = (chosen != UNROUTED).nonzero().flatten()
    if len(rows):
        there, turned = read.there, read.turned
        mentions = [
            mention_in(read.states[row, there[row]], turned[:, row, there[row]], *meaning.tokens_of(edit))
            for row, edit in zip(rows.tolist(), chosen[rows].tolist(), strict=True)
        ]
        asked[rows] = gate(padded(mentions), chosen[rows]).sigmoid()
    return asked


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
