"""Mentions of made-up facts that gates are learned from, one behind the other in few numbers a token.

What a gate reads of a token is a state as wide as the model. Learning needs its leading principal components alone, so
that no more is held of the hundreds of thousands of tokens: their number, and not the model's width, says how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import half
from wisecli.models.running.grouped_rows import rows_of
from wisecli.models.synthetic.gate_examples import WHOLE_PROMPTS
from wisecli.models.synthetic.request_examples import Example
from wisecli.routing.gating.request_gate import Mention, Mentions

# Principal components of states, of each gate; states of a sample by which they are found.
_COMPONENTS = 288
_OF_SAMPLE = 4000
# The share of the facts that are held out, to set where the gate opens.
_HELD_OUT = 0.15
# A whole prompt, of which no two are alike, is learned from so many times a round. So is a question in a prompt of so
# many characters, most of which are texts around it: mentions often hold a text, and a gate that learned from both as
# often would take a long text for a sign of a mention.
_WHOLE_TIMES, _BEHIND_TIMES, _LONG_PROMPT = 2, 2, 700
# Mentions that are looked at together; tokens of a step are filled up to a multiple of so many.
_EVAL_BATCH, _ROUNDED = 256, 512


class StateComponents:
    """Maps states to their leading principal components, standardised.

    Args:
        sample: states by which those are found (n, d).
    """

    def __init__(self, sample: Tensor) -> None:
        sample = sample.float()
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-3)
        spaced = torch.linspace(0, len(sample) - 1, min(len(sample), _OF_SAMPLE)).long()
        basis = torch.linalg.svd((sample[spaced] - self.mean) / self.scale, full_matrices=False)[2]
        self.basis = basis[:_COMPONENTS]

    def __call__(self, states: Tensor) -> Tensor:
        """Return states (n, d) mapped: (n, k)."""
        mapped: Tensor = ((states.float() - self.mean) / self.scale) @ self.basis.T
        return mapped

    def folded_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that apply to states which are not mapped."""
        read = weights["request_gate.read"]
        plain = (read[:, :-1] @ self.basis) / self.scale
        return {**weights, "request_gate.read": torch.cat([plain, (read[:, -1] - plain @ self.mean)[:, None]], 1)}


class PoolPart(NamedTuple):
    """The tokens of m mentions, mention after mention: ``states`` (n, k) and ``features`` (n, f) in half precision.

    ``sizes`` (m,) says how many tokens each mention has, ``examples`` which prompt it is of.
    """

    states: Tensor
    features: Tensor
    sizes: Tensor
    examples: list[Example]

    @classmethod
    def of(
        cls, mentions: Sequence[Mention], examples: Sequence[Example], components: Sequence[StateComponents]
    ) -> PoolPart:
        """Return mentions, of whose states (n, gates · d) each gate's components are kept beside each other."""
        parts = torch.cat([one.states for one in mentions]).chunk(len(components), -1)
        mapped = [of_gate(part) for of_gate, part in zip(components, parts, strict=True)]
        features = half(torch.cat([one.features for one in mentions]))
        sizes = torch.tensor([len(one.states) for one in mentions])
        return cls(half(torch.cat(mapped, -1)), features, sizes, list(examples))


class MentionPool:
    """Mentions of which batches are taken by number.

    ``states`` (N, k) are of what one gate reads, ``features`` (N, f); ``sizes`` (M,) says how many tokens each mention
    has, ``asks`` whether it asks its fact (M,), ``held_out`` whether that fact is held out (M,), and ``times`` (M,) how
    often it is learned from in a round.

    Args:
        parts: the mentions; the list is empty afterwards, so that nothing is held twice.
        facts: how many facts there are.
        device: where batches are wanted.
    """

    def __init__(self, parts: list[PoolPart], facts: int, device: torch.device) -> None:
        examples = [one for part in parts for one in part.examples]
        first_held_out = round(facts * (1 - _HELD_OUT))
        self.sizes = torch.cat([one.sizes for one in parts]).to(device)
        self.asks = torch.tensor([one.asks for one in examples], device=device)
        self.held_out = torch.tensor([one.fact >= first_held_out for one in examples], device=device)
        self.times = torch.tensor([_times(one) for one in examples], device=device)
        tokens = int(self.sizes.sum())
        self.states, self.features = (
            like.new_empty(tokens, like.shape[1], device=device) for like in (parts[0].states, parts[0].features)
        )
        while parts:
            part = parts.pop()
            own = slice(tokens - len(part.states), tokens)
            self.states[own], self.features[own] = part.states, part.features
            tokens -= len(part.states)

    def of_gate(self, number: int, gates: int) -> MentionPool:
        """Return the same with what the gate of a number, of so many, reads."""
        pool = copy(self)
        pool.states = self.states.chunk(gates, -1)[number]
        return pool

    def batch(self, chosen: Tensor, most_dropped: float = 0.0) -> Mentions:
        """Return the mentions of some numbers (B,), without some of their tokens, of each a share up to this one."""
        rows, mention = rows_of(chosen, self.sizes)
        if most_dropped:
            share = most_dropped * torch.rand(len(chosen), device=rows.device)
            kept = torch.rand(len(rows), device=rows.device) >= share.index_select(0, mention)
            # Products of every size are prepared anew, so that there should be few: the rest is of one mention more.
            more = -int(kept.sum()) % _ROUNDED
            rows, mention = F.pad(rows[kept], (0, more)), F.pad(mention[kept], (0, more), value=len(chosen))
        states, features = (part.index_select(0, rows).float() for part in (self.states, self.features))
        return Mentions(states, features, mention, len(chosen) + (most_dropped > 0))

    def held_out_questions(self) -> Iterator[Mentions]:
        """Yield batches of the questions on facts that are held out, those of like length together."""
        numbers = (self.held_out & self.asks).nonzero()[:, 0]
        for some in numbers[self.sizes[numbers].argsort(stable=True)].split(_EVAL_BATCH):
            if len(some):
                yield self.batch(some)

    def epochs(self, size: int) -> Iterator[Tensor]:
        """Yield the numbers of so many of those that may be learned from, if any, all in turn and then anew."""
        numbers = (~self.held_out).nonzero()[:, 0]
        numbers = numbers.repeat_interleave(self.times[numbers])
        while len(numbers):
            order = numbers[torch.randperm(len(numbers)).to(numbers.device)]
            # The last batch of a round is left out where it is smaller.
            yield from (some for some in order.split(size) if len(some) == min(size, len(numbers)))


def _times(example: Example) -> int:
    """Return how often in a round an example is learned from."""
    behind = example.asks and len(example.text) >= _LONG_PROMPT
    return (_WHOLE_TIMES if example.sort == WHOLE_PROMPTS else 1) * (_BEHIND_TIMES if behind else 1)
