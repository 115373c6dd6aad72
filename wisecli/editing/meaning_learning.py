"""How a base model writes down who is asked about, and what: learned from made-up facts in many wordings and forms.

Two projections of early states are learned at once, by contrast within grids of subjects × relations: under the first,
prompts about one subject come together whatever is asked, under the second prompts that ask the same, whoever it is
about. Prompts of both are as in :mod:`wisecli.routing.meaning`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.artifacts.tensor_schema import HEADS, MENTIONED, REQUEST, require_layout
from wisecli.artifacts.unrelated_stats import Heads, heads_in
from wisecli.data.corpus import made_up_subjects, relations, unrelated_texts
from wisecli.editing.early_states import TokenStates, special_tokens, token_states
from wisecli.editing.request_learning import Projections, learn_request_gate
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.forms import Form, forms, usable_forms
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
from wisecli.models.wording import keywords
from wisecli.progress import Event, Watcher

_VERSION = 21
# Dimensions of a projection; subjects of each kind; steps; unrelated texts that all of that goes with.
_WIDTH, _SUBJECTS, _STEPS, _TEXTS = 128, 8, 400, 600
# Of narrower states, in so many dimensions, less is learned: no model that says anything has them.
_NARROW, _FEWEST = 256, 60
# Texts whose tokens are kept for calibration.
_UNRELATED = 240
# Prompts of a fact: so many as an edit could be given, and so many as it could be asked.
_TOLD, _ASKED = 2, 2
# How often a question is written in capitals, and how often as keywords, for which no forms are.
_CAPITALS, _KEYWORDS = 0.15, 0.08
# A step's grid: relations and subjects of one kind, and facts of any kind beside them.
_GRID, _BESIDE = 6, 8
_RATE, _BAR_RATE = 1e-3, 1e-2
# Weights of the losses of probabilities beside those of contrast.
_SURE = 3.0


@dataclass(frozen=True)
class _Fact:
    """One subject under one relation, by numbers, and the texts that tell or ask it, by theirs."""

    kind: str
    relation: int
    subject: int
    told: tuple[int, ...]
    asked: tuple[int, ...]


def learn_heads(loaded: Loaded, site: Site, identity: str, *, texts: int, batch_size: int, watch: Watcher) -> Heads:
    """Learn how to read subjects and relations off the states that leave a site's layer, or take the cache's.

    Args:
        identity: of the base model, for the cache.
        texts: how many unrelated texts go with it; with few, less is learned.
    """
    texts = min(texts, max(_FEWEST, round(_TEXTS * site.d / _NARROW)))
    about = [identity, site.as_dict(), texts, str(loaded.model.dtype), loaded.device.type, _VERSION]
    path = cache_path("meaning") / f"{sha256_json(about)[:32]}.safetensors"
    with suppress(DamagedFileError):
        tensors = load_tensors(path)
        require_layout(path, tensors, {**HEADS, **REQUEST, **MENTIONED}, {})
        if (heads := heads_in(tensors)) is not None:
            return heads
    found = _learn(loaded, site, share=min(1.0, texts / _TEXTS), batch_size=batch_size, watch=watch)
    keep_in_cache(path, lambda working: save_tensors(working, found.tensors(), {}))
    return found


def _learn(loaded: Loaded, site: Site, *, share: float, batch_size: int, watch: Watcher) -> Heads:
    chance = random.Random(0)
    facts, asked = _made_up_facts(loaded, share, chance)
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(0)
        read = token_states(loaded, site, asked, batch_size=batch_size, watch=watch, stage="what prompts mean")
        pool = _Pool(read, len(asked), loaded.device)
        learner = _Learner(pool)
        _train(learner, pool, facts, max(10, round(_STEPS * share)), chance, watch)
        plain = unrelated_texts(max(8, round(_UNRELATED * share)), seed=0)
        unrelated = token_states(loaded, site, plain, batch_size=batch_size, watch=watch, stage="unrelated text")
    heads = learner.heads(special_tokens(loaded), site.layer, unrelated)
    projections = Projections(heads.turns, heads.shifts, heads.weighs, heads.offsets, heads.slopes, heads.bars)
    gate, mentioned = learn_request_gate(loaded, site, projections, share=share, batch_size=batch_size, watch=watch)
    return replace(heads, request=gate, mentioned=mentioned)


def _made_up_facts(loaded: Loaded, share: float, chance: random.Random) -> tuple[list[_Fact], list[str]]:
    """Facts of every kind, in grids of relations × subjects, and the texts that tell and ask them."""
    known, subjects = relations(), max(2, round(_SUBJECTS * share))
    known = known[: max(2 * _GRID, round(len(known) * share))]
    trained = usable_forms(loaded.tokenizer, trained=True)
    plain = [form for form in trained if form.name in ("bare", "question", "chat")]
    facts: list[_Fact] = []
    texts: list[str] = []

    def written(wording: str, form: Form, subject: str) -> int:
        question = wording.replace("{}", subject)
        way = chance.random()
        if form.name != "bare" and way < _CAPITALS:
            question = question.upper()
        elif form.name != "bare" and way > 1 - _KEYWORDS:
            question = keywords(question, subject, chance.choice(("first", "last", "asked"))) or question
        texts.append(form.asked(loaded.tokenizer, question))
        return len(texts) - 1

    for kind in dict.fromkeys(relation.kind for relation in known):
        names = made_up_subjects(kind, subjects, chance)
        for number, relation in enumerate(known):
            if relation.kind != kind:
                continue
            for place, name in enumerate(names):
                wordings = chance.sample(relation.wordings, _TOLD + _ASKED)
                ways = [forms()["bare"], chance.choice(plain), *chance.choices(trained, k=_ASKED)]
                made = [written(*pair, name) for pair in zip(wordings, ways, strict=True)]
                facts.append(_Fact(kind, number, place, tuple(made[:_TOLD]), tuple(made)))
    return facts, texts


@dataclass(frozen=True)
class _Batch:
    """Standardised states (n, d) of tokens; ``text`` (n,) says of which of ``count`` texts each is."""

    states: Tensor
    text: Tensor
    count: int


class _Pool:
    """Standardised states of texts on a device, from which batches are taken."""

    def __init__(self, read: TokenStates, texts: int, device: torch.device) -> None:
        self.states = read.states.to(device)
        sizes = torch.bincount(read.text.to(device), minlength=texts)
        self.first, self.sizes = sizes.cumsum(0) - sizes, sizes
        spaced = torch.linspace(0, len(self.states) - 1, min(len(self.states), 20_000)).long()
        sample = self.states[spaced].float()
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-6)
        self.basis = torch.linalg.svd((sample[:4000] - self.mean) / self.scale, full_matrices=False)[2]

    def batch(self, texts: Sequence[int]) -> _Batch:
        """The tokens of some texts."""
        chosen = torch.tensor(texts, device=self.sizes.device)
        sizes = self.sizes[chosen]
        text = torch.arange(len(chosen), device=sizes.device).repeat_interleave(sizes)
        place = (
            torch.arange(len(text), device=sizes.device) - (sizes.cumsum(0) - sizes)[text] + self.first[chosen][text]
        )
        return _Batch((self.states[place].float() - self.mean) / self.scale, text, len(chosen))


class _Learner(nn.Module):
    """The heads while they are learned; they begin as the leading directions of the states."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__()
        width = min(_WIDTH, *pool.basis.shape)
        self.turns = nn.Parameter(pool.basis[:width].repeat(2, 1, 1))
        self.weighs = nn.Parameter(pool.mean.new_zeros(2, pool.basis.shape[1]))
        self.offsets = nn.Parameter(pool.mean.new_zeros(2))
        self.bars = nn.Parameter(pool.mean.new_full((2,), 0.6))
        self.slopes = nn.Parameter(pool.mean.new_full((2,), 2.5))
        self.contrast = nn.Parameter(pool.mean.new_full((2,), 2.5))
        self.mean, self.scale = pool.mean, pool.scale

    def scores(self, told: _Batch, asked: _Batch) -> Tensor:
        """How near each told prompt's tokens come to those of each asked one, for both heads: (2, N, M)."""
        found = []
        for head in range(2):
            own = F.normalize(told.states @ self.turns[head].T, dim=-1)
            cosines = own @ F.normalize(asked.states @ self.turns[head].T, dim=-1).T
            near = cosines.new_full((len(own), asked.count), -1.0)
            near = near.scatter_reduce(1, asked.text.expand_as(cosines), cosines, "amax")
            weights = F.softplus(told.states @ self.weighs[head] + self.offsets[head])
            whole = weights.new_zeros(told.count).index_add(0, told.text, weights)
            shares = weights / whole[told.text].clamp(min=1e-6)
            found.append(near.new_zeros(told.count, asked.count).index_add(0, told.text, near * shares[:, None]))
        return torch.stack(found)

    def heads(self, breaks: Tensor, layer: int, unrelated: TokenStates) -> Heads:
        """What was learned, as it applies to states that are not standardised."""
        turns, weighs = (part.detach() / self.scale for part in (self.turns, self.weighs))
        shifts = -(turns @ self.mean)
        offsets = self.offsets.detach() - weighs @ self.mean
        slopes, bars = self.slopes.detach().exp(), self.bars.detach().clone()
        quiet = unrelated.states, unrelated.text
        turns, shifts, weighs, offsets, slopes, bars = (
            part.cpu() for part in (turns, shifts, weighs, offsets, slopes, bars)
        )
        return Heads(turns, shifts, weighs, offsets, slopes, bars, breaks, torch.tensor([layer]), *quiet)


def _train(
    learner: _Learner, pool: _Pool, facts: Sequence[_Fact], steps: int, chance: random.Random, watch: Watcher
) -> None:
    groups = [
        {"params": [learner.turns, learner.weighs, learner.offsets], "lr": _RATE},
        {"params": [learner.bars, learner.slopes, learner.contrast], "lr": _BAR_RATE},
    ]
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.4 * steps)))
    for step in range(steps):
        drawn = _drawn(facts, chance)
        told = [chance.choice(fact.told) for fact in drawn]
        asked = [
            chance.choice([text for text in fact.asked if text != own]) for fact, own in zip(drawn, told, strict=True)
        ]
        loss = _loss(learner, learner.scores(pool.batch(told), pool.batch(asked)), drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        watch(Event("router", step + 1, steps, f"loss {float(loss.detach()):.2f}"))


def _drawn(facts: Sequence[_Fact], chance: random.Random) -> list[_Fact]:
    """A grid of relations × subjects of one kind, and some facts of any kind beside it."""
    kind = chance.choice(facts).kind
    own = [fact for fact in facts if fact.kind == kind]
    asked, about = sorted({fact.relation for fact in own}), sorted({fact.subject for fact in own})
    asked = chance.sample(asked, min(_GRID, len(asked)))
    about = chance.sample(about, min(_GRID, len(about)))
    grid = [fact for fact in own if fact.relation in asked and fact.subject in about]
    return list(dict.fromkeys([*grid, *chance.sample(facts, min(_BESIDE, len(facts)))]))


def _loss(learner: _Learner, scores: Tensor, facts: Sequence[_Fact]) -> Tensor:
    """Of scores (2, N, N): contrast of subjects and of relations, and the probabilities of each and of both."""
    same = torch.tensor(
        [
            [[(one.kind, one.subject) == (other.kind, other.subject) for other in facts] for one in facts],
            [[one.relation == other.relation for other in facts] for one in facts],
        ],
        device=scores.device,
    )
    logits = learner.slopes.exp()[:, None, None] * (scores - learner.bars[:, None, None])
    total = scores.new_zeros(())
    for head in range(2):
        total = total + _SURE * _probable(logits[head], same[head])
        total = total + _contrast(scores[head] * learner.contrast[head].exp(), same[head])
    both = F.logsigmoid(logits).sum(0).exp().clamp(1e-6, 1 - 1e-6)
    alike = same.all(0).float()
    weight = 1 + alike * (len(facts) / 4)
    return total + _SURE * F.binary_cross_entropy(both, alike, weight=weight)


def _probable(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of probabilities; as few pairs are the same, those count for more."""
    wanted = same.float()
    return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=(1 - wanted).sum() / wanted.sum() / 4)


def _contrast(logits: Tensor, same: Tensor) -> Tensor:
    """InfoNCE both ways; several may be the same."""
    own = logits.masked_fill(~same, -1e9)
    return sum(((logits.logsumexp(side) - own.logsumexp(side)).mean() for side in (0, 1)), logits.new_zeros(()))
