"""Prompts around made-up facts → what gates read of those that late interaction finds.

Late interaction finds the facts that prompts mention, by projections that are learned before; what the gates read of
the tokens around is what :mod:`.request_gate_training` learns them from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import Projections
from wisecli.editing.router_training.mention_pool import PoolPart, StateComponents
from wisecli.editing.router_training.token_states import ReadChunk, ReadSites, both_states, token_states
from wisecli.environment import return_freed_memory
from wisecli.models.loading import Loaded
from wisecli.models.running.grouped_rows import rows_of
from wisecli.models.running.quick_products import quick_products
from wisecli.models.synthetic.request_examples import Example
from wisecli.models.synthetic.synthetic_facts import SyntheticFact
from wisecli.progress import ProgressCallback
from wisecli.routing.gating.request_gate import Mention, Request, TokenMarks, mention_features
from wisecli.routing.gating.two_requests import first_part

# Prompts whose states are held at a time, until what the gates read is found: so many, or of wide states fewer, with so
# many numbers of one token each.
_MOST_HELD, _HELD_NUMBERS = 1024, 1 << 20
# Requests whose mentions are looked at together.
_AT_A_TIME = 128
_STAGE = "what prompts want"


@dataclass(frozen=True)
class FactPrompt:
    """The tokens of a fact's own prompt, its subject's and the others: projected (t, k), and their shares (t,)."""

    projected: tuple[Tensor, Tensor]
    token_weights: tuple[Tensor, Tensor]

    def match_prob(self, projections: Projections, projected: Tensor) -> float:
        """Return how likely a request means this, whose tokens are projected as these are (2, n, k)."""
        prob = 1.0
        for head, (tokens, weights) in enumerate(zip(self.projected, self.token_weights, strict=True)):
            if len(tokens) and projected.shape[1]:
                score = (tokens @ projected[head].T).amax(1) @ weights
                prob *= float((projections.logit_scale[head] * (score - projections.logit_offset[head])).sigmoid())
        return prob


class FoundMention(NamedTuple):
    """An example that late interaction finds, what the gate reads of it, and how likely it means its fact."""

    example: Example
    mention: Mention
    fact_prob: float


class _Read(NamedTuple):
    """What was read of prompts, and the marks of all of their tokens."""

    chunk: ReadChunk
    marks: TokenMarks

    def request(self, number: int, tokens: Tensor, projected: Tensor, edit_tokens: tuple[Tensor, Tensor]) -> Request:
        """Return the prompt of a number, of some of the tokens (n,), with a fact that it may mention."""
        states, starts = self.chunk.router, self.marks.starts
        first = self._of_gates("first_state", number) if states.first_is_word[number] else None
        marks = TokenMarks(self.marks.ends[tokens], None if starts is None else starts[tokens])
        earlier = states.in_earlier_turn[tokens]
        return Request(self._of_gates("states", tokens), projected, edit_tokens, earlier, first, marks)

    def _of_gates(self, name: str, chosen: Tensor | int) -> Tensor:
        """Return some states of what was read, those of the deep gate's layer behind the others: (..., d or 2 · d)."""
        read = (self.chunk.router, self.chunk.gate)
        return torch.cat([getattr(one, name)[chosen] for one in read if one is not None], -1)


@dataclass(frozen=True)
class MentionReader:
    """Reads prompts around made-up facts, and finds the facts that they mention.

    Args:
        token_marks: ``TOKEN_MARKS`` by name.
        fact_prompts: each fact's own prompt.
    """

    loaded: Loaded
    sites: ReadSites
    projections: Projections
    token_marks: Mapping[str, Tensor]
    fact_prompts: Sequence[FactPrompt]
    batch_size: int
    on_progress: ProgressCallback

    def read(self, examples: Sequence[Example]) -> Iterator[tuple[list[Example], _Read]]:
        """Yield some examples at a time with what was read of them."""
        with quick_products(self.loaded, self.sites.gate or self.sites.router):
            for chunk in both_states(
                self.loaded,
                self.sites,
                [one.text for one in examples],
                turns=[one.turns for one in examples],
                batch_size=self.batch_size,
                on_progress=self.on_progress,
                stage=_STAGE,
                at_a_time=min(_MOST_HELD, _HELD_NUMBERS // self.sites.router.d),
            ):
                marks = TokenMarks.of(chunk.router.token, self.token_marks)
                yield [examples[number] for number in chunk.numbers], _Read(chunk, marks)
                del chunk, marks
                return_freed_memory()

    def components(self, examples: Sequence[Example]) -> list[StateComponents]:
        """Return what each gate's states are mapped by, of the tokens of some examples."""
        read = [one.chunk for _, one in self.read(examples)]
        of_gates = [[one.router for one in read], [one.gate for one in read if one.gate is not None]]
        return [StateComponents(torch.cat([one.states for one in some])) for some in of_gates if some]

    def pool(self, examples: Sequence[Example], least: float, components: Sequence[StateComponents]) -> list[PoolPart]:
        """Return what the gates read of those examples that are found, as likely as ``least``, in components."""
        parts = []
        for found in self.found(examples, least):
            if found:
                mentions, of = [one.mention for one in found], [one.example for one in found]
                parts.append(PoolPart.of(mentions, of, components))
        return parts

    def found(self, examples: Sequence[Example], least: float) -> Iterator[list[FoundMention]]:
        """Yield what the gates read of those examples that are found, as likely as ``least``, some at a time."""
        for some, read in self.read(examples):
            yield _mentions(self.projections, self.fact_prompts, some, read, least)


def fact_prompts(
    loaded: Loaded,
    sites: ReadSites,
    projections: Projections,
    facts: Sequence[SyntheticFact],
    batch_size: int,
    on_progress: ProgressCallback,
) -> list[FactPrompt]:
    """Return the tokens of each fact's own prompt, as late interaction compares them."""
    with quick_products(loaded, sites.router):
        texts = [fact.questions[0] for fact in facts]
        read = token_states(loaded, sites.router, texts, batch_size=batch_size, on_progress=on_progress, stage=_STAGE)
    sizes, found = torch.bincount(read.text, minlength=len(facts)).tolist(), []
    for fact, state, place in zip(facts, read.states.split(sizes), read.position.split(sizes), strict=True):
        subject = _subject_mask(loaded, fact, place)
        parts = state[subject], state[~subject]
        projected = projections.project(parts[0], 0), projections.project(parts[1], 1)
        shares = projections.token_weights(parts[0], 0), projections.token_weights(parts[1], 1)
        found.append(FactPrompt(projected, shares))
    return found


def _mentions(
    projections: Projections,
    fact_prompts: Sequence[FactPrompt],
    examples: Sequence[Example],
    read: _Read,
    least: float,
) -> list[FoundMention]:
    """Return what the gate reads of those examples that are found, as likely as ``least``."""
    states = read.chunk.router
    sizes = torch.bincount(states.text, minlength=len(examples))
    # Requests of like length together, as the shorter ones of a batch are filled up.
    order = sizes.argsort(stable=True)
    mentions: dict[int, Mention] = {}
    probs: dict[int, float] = {}
    for places in order[sizes[order] > 0].split(_AT_A_TIME):
        requests: dict[int, Request] = {}
        rows, each = rows_of(places, sizes)[0], sizes[places].tolist()
        together = torch.stack([projections.project(states.states[rows], head) for head in range(2)])
        of_each = zip(places.tolist(), rows.split(each), together.split(each, dim=1), strict=True)
        for place, all_tokens, all_projected in of_each:
            fact, second = fact_prompts[examples[place].fact], examples[place].second
            tokens, projected = all_tokens, all_projected
            if second is not None:
                facts = fact.projected, fact_prompts[second].projected
                part = first_part(projected, facts, read.marks.ends[tokens])
                tokens, projected = tokens[part], projected[:, part]
            probs[place] = fact.match_prob(projections, projected)
            if probs[place] >= least:
                requests[place] = read.request(place, tokens, projected, fact.projected)
        if requests:
            mentions |= zip(requests, mention_features(list(requests.values())), strict=True)
    return [FoundMention(examples[place], mentions[place], probs[place]) for place in sorted(mentions)]


def _subject_mask(loaded: Loaded, fact: SyntheticFact, places: Tensor) -> Tensor:
    """Return which of the tokens at some places (n,) of a fact's own prompt are of its subject (n,)."""
    text = fact.questions[0]
    first = text.find(fact.subject)
    if first < 0 or not loaded.tokenizer.is_fast:
        return torch.ones(len(places), dtype=torch.bool)
    last = first + len(fact.subject)
    spans = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([spans[place][0] < last and spans[place][1] > first for place in places.tolist()])
