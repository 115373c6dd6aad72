"""How a base model's states tell a request from a mention: learned from made-up facts that are asked and mentioned.

The gate is that of :mod:`wisecli.routing.gating.request_gate`. It is learned behind the projections of late
interaction, which find what is mentioned, from those examples of
:mod:`wisecli.models.synthetic.gate_examples` that late interaction finds. Where it opens is set by facts that
it was not learned from, and so is measured which mentions of them it lets through.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.editing.router_training.gate_weights import train_and_calibrate
from wisecli.editing.router_training.token_characters import sentence_token_ids, word_starts
from wisecli.editing.router_training.token_states import ReadSites, TokenStates, both_states
from wisecli.models.loading import Loaded
from wisecli.models.running.grouped_rows import rows_of
from wisecli.models.running.quick_products import quick_products
from wisecli.models.running.seeding import seeded
from wisecli.models.synthetic.gate_examples import GateExamples
from wisecli.models.synthetic.request_examples import Example
from wisecli.models.synthetic.synthetic_facts import SyntheticFact, synthetic_facts
from wisecli.progress import ProgressCallback
from wisecli.routing.gating.gates import Gates
from wisecli.routing.gating.request_gate import (
    DEEP_GATE,
    DEEP_LOGIT_OFFSET,
    LOGIT_OFFSET,
    MIN_GATED_PROB,
    REQUEST_GATE,
    TOKEN_MARKS,
    Mention,
    Request,
    TokenMarks,
    batch_mentions,
    mention_features,
)
from wisecli.routing.gating.two_requests import first_part

# Facts, and steps of learning, of all gates at once; with less to learn from, at least so many steps.
_FACTS, _STEPS, _FEWEST_STEPS = 280, 5000, 14
# Facts whose prompts are read together: the states of all of their tokens are held until what the gate reads is found.
_FACTS_AT_A_TIME = 160
# Prompts that late interaction finds less likely than this to mean a fact are not learned from.
_FOUND = 0.25
# Requests whose mentions are looked at together.
_AT_A_TIME = 128
# So many facts are mentioned in wordings that nothing is learned from.
_CHECKED = 12


@dataclass(frozen=True)
class Projections:
    """What late interaction compares, and how it weighs it: see :mod:`wisecli.routing.deciding.late_interaction`.

    States x become ``proj_weight x + shifts``, (2, k, d) and (2, k), and count ``softplus(weighs x + offsets)``, (2, d)
    and (2,); ``logit_scale`` and ``logit_offset`` (2,) make probabilities of scores.
    """

    proj_weight: Tensor
    proj_bias: Tensor
    token_weight: Tensor
    token_bias: Tensor
    logit_scale: Tensor
    logit_offset: Tensor

    def project(self, states: Tensor, head: int) -> Tensor:
        """States (n, d) under one projection, of length 1: (n, k)."""
        return F.normalize(F.linear(states.float(), self.proj_weight[head], self.proj_bias[head]), dim=-1)

    def token_weights(self, states: Tensor, head: int) -> Tensor:
        """Return how much each of the tokens of a prompt (n, d) counts: (n,)."""
        weights = F.softplus(states.float() @ self.token_weight[head] + self.token_bias[head])
        return weights / weights.sum().clamp(min=1e-6)


@dataclass(frozen=True)
class _FactPrompt:
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


class _Found(NamedTuple):
    """An example that late interaction finds, what the gate reads of it, and how likely it means its fact."""

    example: Example
    mention: Mention
    fact_prob: float


class _Read(NamedTuple):
    """What was read of prompts in the router's layer and in a deep gate's, and the marks of all of their tokens."""

    states: TokenStates
    deep: TokenStates | None
    marks: TokenMarks

    def request(self, number: int, tokens: Tensor, projected: Tensor, edit_tokens: tuple[Tensor, Tensor]) -> Request:
        """Return the prompt of a number, of some of the tokens (n,), with a fact that it may mention."""
        states, starts = self.states, self.marks.starts
        first = self._of_gates("first_state", number) if states.first_is_word[number] else None
        marks = TokenMarks(self.marks.ends[tokens], None if starts is None else starts[tokens])
        earlier = states.in_earlier_turn[tokens]
        return Request(self._of_gates("states", tokens), projected, edit_tokens, earlier, first, marks)

    def _of_gates(self, name: str, chosen: Tensor | int) -> Tensor:
        """Return some states of what was read, those of the deep gate's layer behind the others: (..., d or 2 · d)."""
        read = (self.states, self.deep)
        return torch.cat([getattr(one, name)[chosen] for one in read if one is not None], -1)


def train_request_gate(
    loaded: Loaded,
    sites: ReadSites,
    projections: Projections,
    *,
    share: float,
    batch_size: int,
    on_progress: ProgressCallback,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a base model's request gate; how many mentions open their fact all the same, of how
    many: (2,).

    Args:
        sites: the layers whose states are read.
        share: of the facts and steps; with less, less is learned.
    """
    rng = random.Random(0)
    facts = list(synthetic_facts(max(8, round(_FACTS * share)), rng))
    examples_by_fact = GateExamples(loaded.tokenizer, facts, rng)

    token_marks = dict(
        zip(TOKEN_MARKS, (*sentence_token_ids(loaded.tokenizer), word_starts(loaded.tokenizer)), strict=True)
    )

    def read(texts: Sequence[str], *, turns: bool = False) -> _Read:
        with quick_products(loaded, sites.gate or sites.router):
            states, *deep = both_states(
                loaded,
                sites,
                texts,
                batch_size=batch_size,
                on_progress=on_progress,
                stage="what prompts want",
                turns=turns,
            )
        return _Read(states, deep[0] if deep else None, TokenMarks.of(states.token, token_marks))

    own_prompts = read([fact.questions[0] for fact in facts]).states
    fact_prompts = list(_fact_prompts(loaded, projections, facts, own_prompts))
    found: list[_Found] = []
    for examples, turns in examples_by_fact.groups(_FACTS_AT_A_TIME):
        texts = read([one.text for one in examples], turns=turns)
        found += _mentions(projections, fact_prompts, examples, texts, _FOUND)
    with seeded(0, loaded.device):
        learned, steps = [one.example for one in found], max(_FEWEST_STEPS, round(_STEPS * share))
        weights: dict[str, Tensor] = {}
        gates = (REQUEST_GATE,) if sites.gate is None else (REQUEST_GATE, DEEP_GATE)
        for number, names in enumerate(gates):
            at = [_of_gate(one.mention, number, len(gates), loaded.device) for one in found]
            gate = train_and_calibrate(at, learned, len(facts), steps, on_progress)
            weights |= zip(names, gate.values(), strict=True)
    held_back = [one for number in range(len(facts))[-_CHECKED:] for one in examples_by_fact.held_back(number)]
    texts = read([one.text for one in held_back])
    checked = _mentions(projections, fact_prompts, held_back, texts, MIN_GATED_PROB)
    return weights | token_marks, torch.tensor([_opened(weights, checked), len(held_back)])


def _of_gate(mention: Mention, number: int, gates: int, device: torch.device) -> Mention:
    """Return what the gate of a number, of so many, reads of a mention."""
    return Mention(mention.states.chunk(gates, -1)[number].to(device), mention.features.to(device))


def _opened(weights: Mapping[str, Tensor], found: Sequence[_Found]) -> int:
    """Return how many of some examples open the fact that they mention."""
    gates = Gates.of({**weights, LOGIT_OFFSET: torch.zeros(1), DEEP_LOGIT_OFFSET: torch.zeros(1)})
    count = 0
    for first in range(0, len(found), _AT_A_TIME):
        some = found[first : first + _AT_A_TIME]
        probs, fact = torch.tensor([one.fact_prob for one in some]), torch.zeros(len(some), dtype=torch.long)
        count += int((gates.ask_probs(batch_mentions([one.mention for one in some]), fact, probs) > gates.bar).sum())
    return count


def _fact_prompts(
    loaded: Loaded, projections: Projections, facts: Sequence[SyntheticFact], read: TokenStates
) -> Iterator[_FactPrompt]:
    sizes = torch.bincount(read.text, minlength=len(facts)).tolist()
    for fact, state, place in zip(facts, read.states.split(sizes), read.position.split(sizes), strict=True):
        subject = _subject_mask(loaded, fact, place)
        parts = state[subject], state[~subject]
        yield _FactPrompt(
            (projections.project(parts[0], 0), projections.project(parts[1], 1)),
            (projections.token_weights(parts[0], 0), projections.token_weights(parts[1], 1)),
        )


def _mentions(
    projections: Projections,
    fact_prompts: Sequence[_FactPrompt],
    examples: Sequence[Example],
    read: _Read,
    least: float,
) -> list[_Found]:
    """Return what the gate reads of those examples that are found, as likely as ``least``."""
    sizes = torch.bincount(read.states.text, minlength=len(examples))
    # Requests of like length together, as the shorter ones of a batch are filled up.
    order = sizes.argsort(stable=True)
    mentions: dict[int, Mention] = {}
    probs: dict[int, float] = {}
    for places in order[sizes[order] > 0].split(_AT_A_TIME):
        requests: dict[int, Request] = {}
        rows, each = rows_of(places, sizes)[0], sizes[places].tolist()
        together = torch.stack([projections.project(read.states.states[rows], head) for head in range(2)])
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
    return [_Found(examples[place], mentions[place], probs[place]) for place in sorted(mentions)]


def _subject_mask(loaded: Loaded, fact: SyntheticFact, places: Tensor) -> Tensor:
    """Return which of the tokens at some places (n,) of a fact's own prompt are of its subject (n,)."""
    text = fact.questions[0]
    first = text.find(fact.subject)
    if first < 0 or not loaded.tokenizer.is_fast:
        return torch.ones(len(places), dtype=torch.bool)
    last = first + len(fact.subject)
    spans = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([spans[place][0] < last and spans[place][1] > first for place in places.tolist()])
