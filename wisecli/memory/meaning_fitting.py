"""The tensors by which a memory knows the prompts that mean its edits, from the states of edits' own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import PromptStates, half
from wisecli.artifacts.unrelated_stats import Heads
from wisecli.memory.near_prompts import NearPrompts
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
# Prompts that are compared at a time: the fewer, the fewer edits are like any of them; and tokens read at a time.
_AT_A_TIME, _TOKENS = 64, 1 << 15
# Sums of tokens' states that differ by less than this share are of the very same tokens.
_SAME = 1e-3


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
    forms = int(prompts.form.max()) + 1
    _, asked = (prompts.edit.long() * forms + prompts.form.long()).unique(return_inverse=True)
    count = int(asked.max()) + 1
    whose = torch.zeros(count, dtype=torch.long).index_copy(0, asked, prompts.edit.long())
    vectors, shares, asking = [], [], []
    for head in range(2):
        along = [part.float() @ heads.weighs[head].float() for part in prompts.states.split(_TOKENS)]
        weights = F.softplus(torch.cat(along) + heads.offsets[head])
        marked = prompts.subject if head == 0 else ~prompts.subject
        share = _shares(torch.where(marked, weights, weights * _OTHER), asked, count)
        kept = share >= _LEAST
        turned = heads.turns[head].float(), heads.shifts[head].float()
        parts = prompts.states[kept].split(_TOKENS)
        vectors += [half(F.normalize(F.linear(part.float(), *turned), dim=-1)) for part in parts]
        shares.append(_shares(share[kept], asked[kept], count))
        asking.append(asked[kept] + head * count)
    tensors = {
        "meaning.turns": heads.turns,
        "meaning.shifts": heads.shifts,
        "meaning.slopes": heads.slopes,
        "meaning.bars": heads.bars,
        "meaning.vectors": torch.cat(vectors),
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
    openings, prompts = prompts.openings, prompts.compared
    # As it is written, and in other languages.
    taught = prompts.rows((prompts.form == 0) | (prompts.form >= _OTHER_LANGUAGES))
    each = torch.stack([taught.edit.long(), taught.form.long()], 1)
    pairs, sizes = each.unique_consecutive(dim=0, return_counts=True)
    tokens = _OwnTokens(tensors)
    states = taught.states.split(sizes.tolist())
    for some in torch.arange(len(pairs)).split(_AT_A_TIME):
        own = torch.cat([states[number] for number in some.tolist()]).float()
        turned = meaning.read(own[None], torch.ones(1, len(own), dtype=torch.bool)).turned[:, 0]
        parts = zip(
            own.split(sizes[some].tolist()), turned.split(sizes[some].tolist(), 1), pairs[some].tolist(), strict=True
        )
        mentions = [
            mention_in(one, near, *tokens.of(edit), opening=openings.get((edit, form)))
            for one, near, (edit, form) in parts
        ]
        lower = (gate.log_odds(together(mentions)) - _BELOW_OWN).clamp(_LOWEST_BAR, 0.0)
        bars = bars.scatter_reduce(0, pairs[some, 0], lower, "amin")
    return {**heads.request, BARS: bars}


class _OwnTokens:
    """What :meth:`Meaning.tokens_of` finds, of one edit after the other."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.vectors, self.whose = tensors["meaning.vectors"], tensors["meaning.whose"]
        self.order = tensors["meaning.asking"].argsort(stable=True)
        counts = torch.bincount(tensors["meaning.asking"], minlength=2 * len(self.whose))
        self.ends = counts.cumsum(0)
        self.first = {edit: place for place, edit in reversed(list(enumerate(self.whose.tolist())))}

    def of(self, edit: int) -> tuple[Tensor, Tensor]:
        """The projected tokens of its prompt as it is written: of its subject, and the others, (t, k) twice."""
        if (first := self.first.get(edit)) is None:
            return self.vectors[:0].float(), self.vectors[:0].float()
        subject, relation = (self._asking(first + head * len(self.whose)) for head in range(2))
        return subject, relation

    def _asking(self, prompt: int) -> Tensor:
        begin = int(self.ends[prompt - 1]) if prompt else 0
        return self.vectors[self.order[begin : int(self.ends[prompt])]].float()


def _shares(weights: Tensor, asked: Tensor, count: int) -> Tensor:
    """Weights (n,) of tokens as shares of their prompts' whole."""
    return weights / torch.zeros(count).index_add(0, asked, weights)[asked]


def _by_own_prompts(meaning: Meaning, prompts: PromptStates, asked: Tensor, whose: Tensor) -> tuple[Tensor, Tensor]:
    """How surely each kept prompt (g,) means its own edit, and any other's means each edit: (g,), (M,)."""
    sums = torch.zeros(len(whose), prompts.states.shape[1])
    for own, part in zip(asked.split(_TOKENS), prompts.states.split(_TOKENS), strict=True):
        sums.index_add_(0, own, part.float())
    first, second = _twins(sums, torch.bincount(asked, minlength=len(whose)))
    place = torch.empty(len(whose), dtype=torch.long)
    mine, others = torch.empty(len(whose)), torch.zeros(meaning.edits)
    near = NearPrompts(meaning)
    for part, states, there in _in_parts(prompts.states, asked, len(whose)):
        sure = near(meaning.read(states, there), whose[part])
        mine[part] = sure.gather(1, whose[part, None]).flatten()
        sure.scatter_(1, whose[part, None], 0.0)
        # A prompt of the very same tokens is no other.
        place.fill_(-1)[part] = torch.arange(len(part))
        row = place[first]
        sure[row[row >= 0], whose[second[row >= 0]]] = 0.0
        others = others.maximum(sure.amax(0))
    return mine, others


def _twins(sums: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of prompts, both ways, that have the same tokens: their states add up to the same (g, d).

    Args:
        sizes: how many tokens each prompt has (g,).
    """
    signs = (torch.arange(sums.shape[1]) % 2 * 2 - 1.0) / sums.shape[1] ** 0.5
    along, across, least = sums @ signs.abs(), sums @ signs, 1.01 * _SAME * sums.norm(dim=-1)
    # No two are further apart along one direction than they are altogether.
    order = along.argsort()
    order = order[sizes[order].argsort(stable=True)]
    found: list[Tensor] = []
    for apart in range(1, len(order)):
        one, other = order[:-apart], order[apart:]
        close = (sizes[one] == sizes[other]) & (along[other] - along[one] < least.max())
        near = close & ((across[other] - across[one]).abs() < least.max())
        if not bool(close.any()):
            break
        one, other = one[near], other[near]
        distance = (sums[one] - sums[other]).norm(dim=-1)
        found += [
            torch.stack(pair)[:, distance < _SAME * sums[pair[0]].norm(dim=-1)] for pair in ((one, other), (other, one))
        ]
    pairs = torch.cat(found, 1) if found else torch.empty(2, 0, dtype=torch.long)
    return pairs[0], pairs[1]


def sureness(meaning: Meaning, states: Tensor, text: Tensor, count: int) -> Tensor:
    """How surely each of some texts, whose tokens have these states (n, d), means each edit: (texts, M)."""
    found = torch.empty(count, meaning.edits)
    for part, own, there in _in_parts(states, text, count):
        found[part] = meaning(own, there)
    return found


def _in_parts(states: Tensor, text: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some of the texts (p,), the states of their tokens (p, W, d), and which are there (p, W); the shortest first."""
    sizes = torch.bincount(text, minlength=count)
    order = text.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    for part in sizes.argsort(stable=True).split(_AT_A_TIME):
        column = torch.arange(int(sizes[part].max()))
        there = column < sizes[part, None]
        place = order[(first[part, None] + column).clamp(max=len(order) - 1)]
        yield part, states[place].float(), there
