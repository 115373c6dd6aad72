"""How a base model's states tell a request from a mention: learned from made-up facts that are asked and mentioned.

The gate is that of :mod:`wisecli.routing.request_gate_tensors`. It is learned behind the projections of late
interaction, which find what is mentioned, from those examples of
:mod:`wisecli.editing.router_training.request_examples` that late interaction finds. Where it opens is set by facts that
it was not learned from, and so is measured which mentions of them it lets through.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.editing.router_training.request_examples import Example, Examples
from wisecli.editing.router_training.synthetic_facts import SyntheticFact, synthetic_facts
from wisecli.editing.router_training.token_states import TokenStates, token_states
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.running.quick_products import quick_products
from wisecli.models.running.seeding import seeded
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.deciding.request_gate import (
    FEATURE_COUNT,
    Mention,
    Mentions,
    batch_mentions,
    log_odds,
    mention_features,
)

# Facts, and which share of them says where the gate opens.
_FACTS, _APART = 320, 0.15
# Directions of states that are looked at; numbers that one is read as, heads, values of each, and what those become.
_DIRECTIONS, _READ, _HEADS, _VALUES, _MIXED = 96, 64, 8, 32, 64
_STEPS, _BATCH, _RATE, _DECAY, _DROPPED, _SURE = 800, 192, 4e-3, 0.3, 0.3, 0.98
# Up to which share of a mention's tokens is left out, so that no few of them, of a text that is known, say it all.
_LEFT_OUT = 0.8
# Which share of the questions apart from those learned from may be taken for mentions.
_LOST = 0.05
# Prompts that late interaction finds less likely than this to mean a fact never come to the gate; from the second on
# they open it.
_FOUND, _OPENED = 0.25, 0.5
# So many facts are mentioned in wordings that nothing is learned from.
_CHECKED = 12
_AT_A_TIME = 256


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


def train_request_gate(
    loaded: Loaded,
    site: Site,
    projections: Projections,
    *,
    share: float,
    batch_size: int,
    on_progress: ProgressCallback,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a base model's request gate; how many mentions open their fact all the same, of how
    many: (2,).

    Args:
        site: the layer whose states are read.
        share: of the facts and steps; with less, less is learned.
    """
    rng = random.Random(0)
    facts = list(synthetic_facts(max(8, round(_FACTS * share)), rng))
    examples_by_fact = Examples(loaded.tokenizer, facts, rng)

    def states(texts: Sequence[str], *, turns: bool = False) -> TokenStates:
        stage = "what prompts want"
        with quick_products(loaded, site):
            return token_states(
                loaded, site, texts, batch_size=batch_size, on_progress=on_progress, stage=stage, turns=turns
            )

    fact_prompts = list(_fact_prompts(loaded, projections, facts, states([fact.questions[0] for fact in facts])))
    mentions: list[Mention] = []
    train_examples: list[Example] = []
    for turns in (False, True):
        of = examples_by_fact.conversations if turns else examples_by_fact.of
        examples = [one for number in range(len(facts)) for one in of(number)]
        if examples:
            read = states([one.text for one in examples], turns=turns)
            for example, mention in _mentions(projections, fact_prompts, examples, read):
                train_examples.append(example)
                mentions.append(mention)
    with seeded(0, loaded.device):
        at = [Mention(*(part.to(loaded.device) for part in one)) for one in mentions]
        weights = _train_and_calibrate(at, train_examples, len(facts), max(20, round(_STEPS * share)), rng, on_progress)
    eval_examples = [one for number in range(len(facts))[-_CHECKED:] for one in examples_by_fact.held_back(number)]
    found = _mentions(projections, fact_prompts, eval_examples, states([one.text for one in eval_examples]), _OPENED)
    odds = [log_odds(weights, batch_mentions(part)) for part in _parts([mention for _, mention in found])]
    return weights, torch.tensor([sum(int((one > 0).sum()) for one in odds), len(eval_examples)])


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
    read: TokenStates,
    least: float = _FOUND,
) -> Iterator[tuple[Example, Mention]]:
    """Yield what the gate reads of those examples that are found, as likely as ``least``."""
    sizes = torch.bincount(read.text, minlength=len(examples)).tolist()
    parts = zip(
        examples,
        read.states.split(sizes),
        read.in_earlier_turn.split(sizes),
        read.first_state,
        read.first_is_word,
        strict=True,
    )
    for example, state, in_earlier_turn, first_state, first_is_word in parts:
        projected = torch.stack([projections.project(state, head) for head in range(2)])
        fact = fact_prompts[example.fact]
        if len(state) and fact.match_prob(projections, projected) >= least:
            yield (
                example,
                mention_features(
                    state, projected, *fact.projected, in_earlier_turn, first_state if first_is_word else None
                ),
            )


def _subject_mask(loaded: Loaded, fact: SyntheticFact, places: Tensor) -> Tensor:
    """Return which of the tokens at some places (n,) of a fact's own prompt are of its subject (n,)."""
    text = fact.questions[0]
    first = text.find(fact.subject)
    if first < 0 or not loaded.tokenizer.is_fast:
        return torch.ones(len(places), dtype=torch.bool)
    last = first + len(fact.subject)
    spans = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([spans[place][0] < last and spans[place][1] > first for place in places.tolist()])


class _Standardized:
    """States as they are learned from: in their leading directions, standardised."""

    def __init__(self, mentions: Sequence[Mention]) -> None:
        sample = torch.cat([one.states for one in mentions[:: max(1, len(mentions) // 800)]])
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-3)
        spaced = torch.linspace(0, len(sample) - 1, min(len(sample), 4000)).long()
        basis = torch.linalg.svd((sample[spaced] - self.mean) / self.scale, full_matrices=False)[2]
        self.basis = basis[:_DIRECTIONS]

    def of(self, mention: Mention) -> Mention:
        """Return a mention with its states so."""
        return mention._replace(states=((mention.states - self.mean) / self.scale) @ self.basis.T)

    def folded_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights as they apply to states as they are."""
        read = weights["request_gate.read"]
        plain = (read[:, :-1] @ self.basis) / self.scale
        return {**weights, "request_gate.read": torch.cat([plain, (read[:, -1] - plain @ self.mean)[:, None]], 1)}


def _train_and_calibrate(
    mentions: Sequence[Mention],
    examples: Sequence[Example],
    facts: int,
    steps: int,
    rng: random.Random,
    on_progress: ProgressCallback,
) -> dict[str, Tensor]:
    seen = _Standardized(mentions)
    known = [seen.of(one) for one in mentions]
    least = round(facts * (1 - _APART))
    weights = _train(
        [(one, example.asks) for one, example in zip(known, examples, strict=True) if example.fact < least],
        steps,
        rng,
        on_progress,
    )
    apart = [one for one, example in zip(known, examples, strict=True) if example.fact >= least and example.asks]
    if apart:
        # Nought is where all but a few of these are above it.
        odds = torch.cat([log_odds(weights, batch_mentions(part)) for part in _parts(apart)])
        weights["request_gate.out"][0, -1] -= odds.quantile(_LOST).clamp(max=0)
    return {name: weight.cpu() for name, weight in seen.folded_into(weights).items()}


def _parts(mentions: Sequence[Mention]) -> Iterator[list[Mention]]:
    order = sorted(mentions, key=lambda one: len(one.states))
    for first in range(0, len(order), _AT_A_TIME):
        yield order[first : first + _AT_A_TIME]


def _train(
    examples: Sequence[tuple[Mention, bool]], steps: int, rng: random.Random, on_progress: ProgressCallback
) -> dict[str, Tensor]:
    device = examples[0][0].states.device
    weights = _initial_weights(examples[0][0].states.shape[1], device)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=_RATE, weight_decay=_DECAY)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for step in range(steps):
        chosen = rng.sample(examples, min(_BATCH, len(examples)))
        wanted = torch.tensor([_SURE if asks else 1 - _SURE for _, asks in chosen], device=device)
        found = log_odds(weights, _with_tokens_dropped(batch_mentions([mention for mention, _ in chosen])), _dropped)
        loss = F.binary_cross_entropy_with_logits(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        rates.step()
        on_progress(Event("requests", step + 1, steps, f"loss {float(loss.detach()):.2f}"))
    return {name: value.detach() for name, value in weights.items()}


def _with_tokens_dropped(mentions: Mentions) -> Mentions:
    """Mentions without some of their tokens, of each another share."""
    device = mentions.mention_index.device
    share = _LEFT_OUT * torch.rand(mentions.size, device=device)
    kept = torch.rand(len(mentions.mention_index), device=device) >= share[mentions.mention_index]
    return Mentions(mentions.states[kept], mentions.features[kept], mentions.mention_index[kept], mentions.size)


def _dropped(values: Tensor) -> Tensor:
    return F.dropout(values, _DROPPED)


def _initial_weights(width: int, device: torch.device) -> dict[str, Tensor]:
    """Weights as they begin: those of layers of torch's, with what is added as the last column."""
    seen, pooled = _READ + FEATURE_COUNT, _HEADS * _VALUES
    shapes = {"read": (_READ, width), "attend": (_HEADS, seen), "value": (pooled, seen)}
    shapes |= {"mix": (_MIXED, pooled), "out": (1, _MIXED)}
    drawn = {}
    for name, (rows, columns) in shapes.items():
        layer = torch.nn.Linear(columns, rows)
        whole = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        drawn[f"request_gate.{name}"] = whole.to(device).requires_grad_()
    return drawn
