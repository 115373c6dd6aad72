"""The tensors by which a memory knows the prompts that mean its edits, from the states of edits' own prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import PromptStates, half
from wisecli.artifacts.unrelated_stats import Heads
from wisecli.routing.meaning import MEANING, Meaning

# How sure a prompt must be to mean an edit; and how much surer than the prompts of all other edits, up to a limit.
SURE, _SURER, _SUREST = 0.5, 1.25, 0.95
# What a token counts that belongs to the other head: nothing, unless there are no others.
_OTHER = 1e-4


@dataclass(frozen=True)
class FittedMeaning:
    """The tensors ``MEANING`` of M edits, and how surely prompts mean them.

    ``own`` (g,) is for each kept prompt how surely it means its edit, ``others`` (M,) how surely any prompt of another
    edit means an edit, ``unrelated`` (u, M) the same for unrelated texts.
    """

    tensors: dict[str, Tensor]
    own: Tensor
    others: Tensor
    unrelated: Tensor

    def thresholds(self, least: float) -> tuple[float, ...]:
        """Of every edit: so high that the other edits' prompts do not mean it, if that leaves room for its own."""
        raised = (self.others * _SURER).clamp(min=least, max=max(least, _SUREST))
        return tuple(raised.tolist())


def fit_meaning(heads: Heads, prompts: PromptStates, edits: int) -> FittedMeaning:
    """What the prompts of M edits mean, as heads see it."""
    _, asked = torch.stack([prompts.edit.long(), prompts.form.long()], 1).unique(dim=0, return_inverse=True)
    count = int(asked.max()) + 1
    whose = torch.zeros(count, dtype=torch.long).index_copy(0, asked, prompts.edit.long())
    vectors, shares = [], []
    for head in range(2):
        turned = F.linear(prompts.states, heads.turns[head].float(), heads.shifts[head].float())
        vectors.append(F.normalize(turned, dim=-1))
        weights = F.softplus(prompts.states @ heads.weighs[head].float() + heads.offsets[head])
        marked = prompts.subject if head == 0 else ~prompts.subject
        weights = torch.where(marked, weights, weights * _OTHER)
        whole = torch.zeros(count).index_add(0, asked, weights)
        shares.append(weights / whole[asked])
    tensors = {
        "meaning.turns": heads.turns,
        "meaning.shifts": heads.shifts,
        "meaning.slopes": heads.slopes,
        "meaning.bars": heads.bars,
        "meaning.vectors": half(torch.cat(vectors)),
        "meaning.asking": torch.cat([asked, asked + count]),
        "meaning.shares": torch.cat(shares),
        "meaning.whose": whose,
        "meaning.breaks": heads.breaks,
    }
    assert tensors.keys() == set(MEANING)
    meaning = Meaning(tensors, edits)
    own = sureness(meaning, prompts.states, asked, count)
    mine = own.gather(1, whose[:, None]).flatten()
    strange = own.masked_fill(_alike(prompts, asked, whose, edits), 0.0)
    unrelated = sureness(meaning, heads.unrelated.float(), heads.text.long(), int(heads.text.max()) + 1)
    return FittedMeaning(tensors, mine, strange.amax(0), unrelated)


def _alike(prompts: PromptStates, asked: Tensor, whose: Tensor, edits: int) -> Tensor:
    """Which prompts (g, M) are an edit's own, or the very tokens of its own."""
    same = whose[:, None] == torch.arange(edits)
    sums = torch.zeros(len(whose), prompts.states.shape[1]).index_add(0, asked, prompts.states)
    twins: Tensor = torch.cdist(sums, sums) < 1e-3 * sums.norm(dim=-1, keepdim=True)
    others = torch.zeros(len(whose), edits).index_add(1, whose, twins.float()) > 0
    return same | others


def sureness(meaning: Meaning, states: Tensor, text: Tensor, count: int, batch: int = 256) -> Tensor:
    """How surely each of some texts, whose tokens have these states (n, d), means each edit: (texts, M)."""
    sizes = torch.bincount(text, minlength=count)
    order = text.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    found = []
    for part in torch.arange(count).split(batch):
        column = torch.arange(int(sizes[part].max()))
        there = column < sizes[part, None]
        place = order[(first[part, None] + column).clamp(max=len(order) - 1)]
        found.append(meaning(states[place], there))
    return torch.cat(found)
