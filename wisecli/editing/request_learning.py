"""How a base model's states tell a request from a mention: learned from made-up facts that are asked and mentioned.

The gate is that of :mod:`wisecli.routing.request_gate`. It is learned behind the projections of late interaction, which
find what is mentioned, from the kinds of prompts that may be learned from (``data/kinds.toml``), from the forms that
edits are trained in, and from tasks and times that are put together (``data/requests.toml``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.data.corpus import Relation, made_up_subjects, relations, requests
from wisecli.editing.early_states import TokenStates, token_states
from wisecli.models.forms import forms, usable_forms
from wisecli.models.kinds import Fact, Kind, kinds
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
from wisecli.progress import Event, Watcher
from wisecli.routing.request_gate import FEATURES, Mention, log_odds, mention_in, padded

# Facts; prompts of each from the kinds; numbers that a state is read as, heads, values of each, and steps.
_FACTS, _KINDS = 260, 11
_READ, _HEADS, _VALUES, _STEPS = 64, 8, 32, 800
_BATCH, _RATE, _DECAY, _DROPPED, _SURE = 96, 4e-3, 0.05, 0.3, 0.98
# Kinds whose subject or question is not where the gate looks: another turn, or the answer.
_ELSEWHERE = ("follow-up", "correction", "two facts", "begun answer", "begun target", "other question", "near name")
# How often a prompt is a chat.
_CHATS = 0.5
# What is asked behind other texts; half of what the kinds have such texts for is not asked.
_BEHIND = Kind(
    "behind texts",
    True,
    (
        ("{page}\n\n{question}",),
        ("{paragraph} {question}",),
        ("{paragraph}\n\n{question}",),
        ("{page}\nQuestion: {question}\nAnswer:",),
        ("{paragraph}\n{question}",),
    ),
    (),
)


@dataclass(frozen=True)
class Projections:
    """What late interaction compares: states x become ``turns x + shifts``, (2, k, d) and (2, k)."""

    turns: Tensor
    shifts: Tensor

    def of(self, states: Tensor, head: int) -> Tensor:
        """States (n, d) under one projection, of length 1: (n, k)."""
        return F.normalize(F.linear(states.float(), self.turns[head], self.shifts[head]), dim=-1)


class _Example(NamedTuple):
    """A prompt around the made-up fact of a number, and whether it asks it."""

    fact: int
    text: str
    asks: bool


class _MadeUp(NamedTuple):
    """A made-up fact in several wordings, the first of which an edit would have."""

    subject: str
    questions: tuple[str, ...]
    other: str
    answer: str


def learn_request_gate(
    loaded: Loaded, site: Site, projections: Projections, *, share: float, batch_size: int, watch: Watcher
) -> dict[str, Tensor]:
    """The tensors of a base model's request gate.

    Args:
        site: the layer whose states are read.
        share: of the facts and steps; with less, less is learned.
    """
    chance = random.Random(0)
    facts = list(_facts(max(8, round(_FACTS * share)), chance))
    examples = [one for number, fact in enumerate(facts) for one in _examples(loaded, number, fact, chance)]
    told = [fact.questions[0] for fact in facts]
    texts = [*told, *(one.text for one in examples)]
    read = token_states(loaded, site, texts, batch_size=batch_size, watch=watch, stage="what prompts want")
    mentions = list(_mentions(loaded, read, projections, facts, examples))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _trained(mentions, examples, max(20, round(_STEPS * share)), chance, watch)


def _facts(count: int, chance: random.Random) -> Iterator[_MadeUp]:
    known = relations()
    names = {kind: made_up_subjects(kind, 8, chance) for kind in dict.fromkeys(one.kind for one in known)}
    for _ in range(count):
        relation: Relation = chance.choice(known)
        subject, other = chance.sample(names[relation.kind], 2)
        wordings = chance.sample(relation.wordings, min(3, len(relation.wordings)))
        answer = chance.choice(names[chance.choice(list(names))])
        yield _MadeUp(subject, tuple(text.replace("{}", subject) for text in wordings), other, answer)


def _examples(loaded: Loaded, number: int, fact: _MadeUp, chance: random.Random) -> Iterator[_Example]:
    """Prompts that ask a fact and prompts that mention it."""
    tokenizer, known = loaded.tokenizer, requests()

    def question() -> str:
        return chance.choice(fact.questions)

    def put(text: str) -> str:
        if not tokenizer.chat_template or chance.random() > _CHATS:
            return text
        names = ("chat", "chat", "chat with system prompt", "second turn")
        return forms()[chance.choice(names)].asked(tokenizer, text)

    for form in chance.sample(usable_forms(tokenizer, trained=True), 3):
        yield _Example(number, form.asked(tokenizer, question()), True)
    for pattern in chance.sample(known.asked, 3):
        yield _Example(number, put(known.filled(pattern, question(), fact.subject, fact.other)), True)
    for pattern in chance.sample(known.mentioned, 2):
        yield _Example(number, put(known.filled(pattern, question(), fact.subject, fact.other)), False)
    for _ in range(2):
        yield _Example(number, put(known.task(question(), chance)), False)
        yield _Example(number, put(known.timed(question(), chance)), False)
    usable = [kind for kind in kinds().values() if kind.name not in _ELSEWHERE]
    documents = [kind for kind in usable if kind.name.startswith("document")]
    for kind in (_BEHIND, _BEHIND, *chance.sample(documents, 2), *chance.sample(usable, _KINDS)):
        about = Fact(question(), fact.subject, fact.answer, fact.other)
        text = kind.written(tokenizer, about, trained=True, chance=chance, chat=chance.random() < _CHATS)
        if text is not None:
            yield _Example(number, text, kind.asked)


def _mentions(
    loaded: Loaded,
    read: TokenStates,
    projections: Projections,
    facts: Sequence[_MadeUp],
    examples: Sequence[_Example],
) -> Iterator[Mention]:
    """What the gate reads of each example; the first texts are the facts' own prompts."""
    sizes = torch.bincount(read.text, minlength=len(facts) + len(examples)).tolist()
    states, places = read.states.split(sizes), read.place.split(sizes)
    own = []
    for fact, state, place in zip(facts, states, places, strict=False):
        subject = _of_subject(loaded, fact, place)
        own.append((projections.of(state[subject], 0), projections.of(state[~subject], 1)))
    for example, state in zip(examples, states[len(facts) :], strict=True):
        turned = torch.stack([projections.of(state, head) for head in range(2)])
        yield mention_in(state.float(), turned, *own[example.fact])


def _of_subject(loaded: Loaded, fact: _MadeUp, places: Tensor) -> Tensor:
    """Which of the tokens at some places (n,) of a fact's own prompt are of its subject (n,)."""
    text = fact.questions[0]
    first = text.find(fact.subject)
    if first < 0 or not loaded.tokenizer.is_fast:
        return torch.ones(len(places), dtype=torch.bool)
    last = first + len(fact.subject)
    spans = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([spans[place][0] < last and spans[place][1] > first for place in places.tolist()])


def _trained(
    mentions: Sequence[Mention], examples: Sequence[_Example], steps: int, chance: random.Random, watch: Watcher
) -> dict[str, Tensor]:
    sample = torch.cat([one.states for one in mentions[:1000]])
    mean, scale = sample.mean(0), sample.std(0).clamp(min=1e-3)
    weights = _drawn(sample.shape[1])
    optimizer = torch.optim.AdamW(list(weights.values()), lr=_RATE, weight_decay=_DECAY)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    wanted = torch.tensor([_SURE if one.asks else 1 - _SURE for one in examples])
    for step in range(steps):
        chosen = chance.sample(range(len(mentions)), min(_BATCH, len(mentions)))
        batch = padded([mentions[place]._replace(states=(mentions[place].states - mean) / scale) for place in chosen])
        found = log_odds(weights, batch, lambda one: F.dropout(one, _DROPPED))
        loss = F.binary_cross_entropy_with_logits(found, wanted[torch.tensor(chosen)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        rates.step()
        watch(Event("requests", step + 1, steps, f"loss {float(loss.detach()):.2f}"))
    return _unstandardised({name: value.detach() for name, value in weights.items()}, mean, scale)


def _drawn(width: int) -> dict[str, Tensor]:
    """Weights as they begin: those of layers of torch's, with what is added as the last column."""
    seen = _READ + FEATURES
    shapes = {"read": (_READ, width), "attend": (_HEADS, seen), "value": (_HEADS * _VALUES, seen)}
    shapes["out"] = (1, _HEADS * _VALUES)
    drawn = {}
    for name, (rows, columns) in shapes.items():
        layer = torch.nn.Linear(columns, rows)
        drawn[f"request.{name}"] = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().requires_grad_()
    return drawn


def _unstandardised(weights: Mapping[str, Tensor], mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The weights as they apply to states that are not standardised."""
    read = weights["request.read"]
    plain = read[:, :-1] / scale
    return {**weights, "request.read": torch.cat([plain, (read[:, -1] - plain @ mean)[:, None]], 1)}
