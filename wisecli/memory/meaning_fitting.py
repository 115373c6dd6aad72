"""The tensors by which a memory knows the prompts that mean its edits, from the states of edits' own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import PromptStates, half
from wisecli.artifacts.unrelated_stats import Heads
from wisecli.routing.meaning import MEANING, Meaning
from wisecli.routing.request_gate import BARS, RequestGate, mention_in, together

# How sure a prompt must be to mean an edit; and how much surer than the prompts of all other edits, up to a limit.
SURE, _SURER, _SUREST = 0.5, 1.25, 0.95
# How much less sure than an edit's own prompt another may be, where that prompt is not sure of itself.
_OWN, _JUST = 0.9, 0.99
# What a token counts that belongs to the other head: nothing, unless there are no others; and the least that counts.
_OTHER, _LEAST = 1e-4, 5e-3
# The forms of kept prompts from this on are in other languages.
_OTHER_LANGUAGES = 4
# How far below the log-odds of its own prompt an edit's bar lies, if that is below nought, and how low it may.
_BELOW_OWN, _LOWEST_BAR = 1.0, -50.0
# Prompts that are compared at a time: the fewer, the fewer edits are like any of them.
_AT_A_TIME = 32


@dataclass(frozen=True)
class FittedMeaning:
    """The tensors ``MEANING`` of M edits, and how surely prompts mean them.

    ``own`` (g,) is for each kept prompt how surely it means its edit, ``taught`` (M,) the same of prompts as
    are written, ``others`` (M,) how surely any prompt of another edit means an edit, ``unrelated`` (u, M) the same for
    unrelated texts.
    """

    tensors: dict[str, Tensor]
    own: Tensor
    taught: Tensor
    others: Tensor
    unrelated: Tensor

    def thresholds(self, least: float) -> tuple[float, ...]:
        """Of every edit: so high that the other edits' prompts do not mean it, if that leaves room for its own.

        Where its own prompt is less sure than that, and surer than all that it must keep apart from, it is lower.
        Of the prompts of other edits that mean it as surely, each means its own more.
        """
        raised = (self.others * _SURER).clamp(min=least, max=max(least, _SUREST))
        unrelated = self.unrelated.amax(0)
        found = raised
        for share, apart in ((_JUST, unrelated), (_OWN, self.others.maximum(unrelated))):
            lowered = self.taught * share
            found = raised.minimum(lowered).where(lowered > apart, found)
        return tuple(found.tolist())


def fit_meaning(heads: Heads, prompts: PromptStates, edits: int) -> FittedMeaning:
    """What the prompts of M edits mean, as heads see it."""
    _, asked = torch.stack([prompts.edit.long(), prompts.form.long()], 1).unique(dim=0, return_inverse=True)
    count = int(asked.max()) + 1
    whose = torch.zeros(count, dtype=torch.long).index_copy(0, asked, prompts.edit.long())
    vectors, shares, asking = [], [], []
    for head in range(2):
        weights = F.softplus(prompts.states @ heads.weighs[head].float() + heads.offsets[head])
        marked = prompts.subject if head == 0 else ~prompts.subject
        share = _shares(torch.where(marked, weights, weights * _OTHER), asked, count)
        kept = share >= _LEAST
        turned = F.linear(prompts.states[kept], heads.turns[head].float(), heads.shifts[head].float())
        vectors.append(F.normalize(turned, dim=-1))
        shares.append(_shares(share[kept], asked[kept], count))
        asking.append(asked[kept] + head * count)
    tensors = {
        "meaning.turns": heads.turns,
        "meaning.shifts": heads.shifts,
        "meaning.slopes": heads.slopes,
        "meaning.bars": heads.bars,
        "meaning.vectors": half(torch.cat(vectors)),
        "meaning.asking": torch.cat(asking),
        "meaning.shares": torch.cat(shares),
        "meaning.whose": whose,
        "meaning.breaks": heads.breaks,
    }
    assert tensors.keys() == set(MEANING)
    meaning = Meaning(tensors, edits)
    mine, others = _by_own_prompts(meaning, prompts, asked, whose)
    unrelated = sureness(meaning, heads.unrelated.float(), heads.text.long(), int(heads.text.max()) + 1)
    # Kept prompts are in order of their edits, and of an edit's the one as it is written comes first.
    first = torch.searchsorted(whose, torch.arange(edits))
    taught = mine[first.clamp(max=count - 1)] * (whose[first.clamp(max=count - 1)] == torch.arange(edits))
    return FittedMeaning(tensors, mine, taught, others, unrelated)


def request_gate(heads: Heads, prompts: PromptStates, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the gate between what is asked and what is mentioned; none if the base model's was not learned.

    A prompt asks an edit that it mentions where that is more likely than not. Where an edit's own prompt is less
    likely, its bar lies below that.

    Args:
        tensors: all of ``MEANING``.
    """
    if not heads.request:
        return {}
    edits = int(tensors["meaning.whose"].max()) + 1 if len(tensors["meaning.whose"]) else 0
    meaning, bars = Meaning(tensors, edits), torch.zeros(edits)
    gate = RequestGate({**heads.request, BARS: bars})
    # As it is written, and in other languages.
    openings, prompts = prompts.openings, prompts.compared
    taught = prompts.rows((prompts.form == 0) | (prompts.form >= _OTHER_LANGUAGES))
    each = torch.stack([taught.edit.long(), taught.form.long()], 1)
    pairs, sizes = each.unique_consecutive(dim=0, return_counts=True)
    for some, states in zip(pairs.split(_AT_A_TIME), _grouped(taught.states, sizes, _AT_A_TIME), strict=True):
        read = [meaning.read(one[None], torch.ones(1, len(one), dtype=torch.bool)) for one in states]
        mentions = [
            mention_in(one.states[0], one.turned[:, 0], *meaning.tokens_of(edit), opening=openings.get((edit, form)))
            for one, (edit, form) in zip(read, some.tolist(), strict=True)
        ]
        lower = (gate.log_odds(together(mentions)) - _BELOW_OWN).clamp(_LOWEST_BAR, 0.0)
        bars = bars.scatter_reduce(0, some[:, 0], lower, "amin")
    return {**heads.request, BARS: bars}


def _grouped(states: Tensor, sizes: Tensor, count: int) -> Iterator[list[Tensor]]:
    """The states of some prompts at a time, by how many tokens each has."""
    whole = states.split(sizes.tolist())
    for first in range(0, len(whole), count):
        yield list(whole[first : first + count])


def _shares(weights: Tensor, asked: Tensor, count: int) -> Tensor:
    """Weights (n,) of tokens as shares of their prompts' whole."""
    return weights / torch.zeros(count).index_add(0, asked, weights)[asked]


def _by_own_prompts(meaning: Meaning, prompts: PromptStates, asked: Tensor, whose: Tensor) -> tuple[Tensor, Tensor]:
    """How surely each kept prompt (g,) means its own edit, and any other's means each edit: (g,), (M,)."""
    sums = torch.zeros(len(whose), prompts.states.shape[1]).index_add(0, asked, prompts.states)
    mine, others = torch.empty(len(whose)), torch.zeros(meaning.edits)
    for part, sure in _in_parts(meaning, prompts.states, asked, len(whose)):
        mine[part] = sure.gather(1, whose[part, None]).flatten()
        # A prompt of the very same tokens is no other.
        twins = torch.cdist(sums[part], sums) < 1e-3 * sums[part].norm(dim=-1, keepdim=True)
        twins[torch.arange(len(part)), part] = True
        own = torch.zeros(len(part), meaning.edits).index_add(1, whose, twins.float()) > 0
        own |= whose[part, None] == torch.arange(meaning.edits)
        others = others.maximum(sure.masked_fill(own, 0.0).amax(0))
    return mine, others


def sureness(meaning: Meaning, states: Tensor, text: Tensor, count: int) -> Tensor:
    """How surely each of some texts, whose tokens have these states (n, d), means each edit: (texts, M)."""
    found = torch.empty(count, meaning.edits)
    for part, sure in _in_parts(meaning, states, text, count):
        found[part] = sure
    return found


def _in_parts(meaning: Meaning, states: Tensor, text: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the texts (p,) and how surely they mean each edit (p, M), the shortest first: so little is padded."""
    sizes = torch.bincount(text, minlength=count)
    order = text.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    for part in sizes.argsort(stable=True).split(_AT_A_TIME):
        column = torch.arange(int(sizes[part].max()))
        there = column < sizes[part, None]
        place = order[(first[part, None] + column).clamp(max=len(order) - 1)]
        yield part, meaning(states[place], there)
