"""How a base model writes down who is asked about, and what: learned from made-up facts in many wordings and forms.

Two projections of early states are learned at once, by contrast within grids of subjects × relations: under the first,
prompts about one subject come together whatever is asked, under the second prompts that ask the same, whoever it is
about. Prompts of both are as in :mod:`wisecli.routing.deciding.late_interaction`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.data.corpus import made_up_subjects, relations, unrelated_texts
from wisecli.editing.router_training.request_gate_training import train_request_gate
from wisecli.editing.router_training.token_states import ReadSites, TokenStates, special_tokens, token_states
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import Form, forms, usable_forms
from wisecli.models.prompts.question_rewriting import keywords
from wisecli.models.running.grouped_rows import rows_of
from wisecli.models.running.quick_products import quick_products
from wisecli.models.running.seeding import seeded
from wisecli.progress import Event, ProgressCallback

# Dimensions of a projection; subjects of each kind; steps; unrelated texts that all of that goes with.
_WIDTH, _SUBJECTS, _STEPS, _TEXTS = 128, 8, 400, 600
# Of narrower states, in so many dimensions, less is learned: no model that says anything has them.
_NARROW, _FEWEST = 256, 60
# Texts whose tokens are kept for calibration.
_UNRELATED = 240
# Prompts of a fact: so many as an edit could be given, and so many as it could be asked.
_EDIT_PROMPTS, _QUERY_PROMPTS = 2, 2
# How often a question is written in capitals, and how often as keywords, for which no forms are.
_CAPITALS, _KEYWORDS = 0.15, 0.08
# A step's grid: relations and subjects of one kind, and facts of any kind beside them.
_GRID, _EXTRA_FACTS = 6, 8
_RATE, _LOGIT_RATE = 1e-3, 1e-2
# Weights of the losses of probabilities beside those of contrast.
_PROBABILITY_WEIGHT = 3.0


@dataclass(frozen=True)
class _Fact:
    """One subject under one relation, by numbers, and the texts that tell or ask it, by theirs."""

    kind: str
    relation: int
    subject: int
    edit_prompts: tuple[int, ...]
    query_prompts: tuple[int, ...]


def train_heads(
    loaded: Loaded, sites: ReadSites, *, texts: int, batch_size: int, on_progress: ProgressCallback
) -> RouterHeads:
    """Learn how to read subjects and relations off the states that leave a layer, and the gates behind it.

    Args:
        texts: how many unrelated texts go with it; with few, less is learned.
    """
    site, rng, share = sites.router, random.Random(0), _share(sites, texts)
    facts, asked = _synthetic_facts(loaded, share, rng)
    with seeded(0, loaded.device):
        with quick_products(loaded, site):
            read = token_states(
                loaded, site, asked, batch_size=batch_size, on_progress=on_progress, stage="what prompts mean"
            )
        pool = _Pool(read, len(asked), loaded.device)
        learner = _ProjectionTrainer(pool)
        _train(learner, pool, facts, max(10, round(_STEPS * share)), rng, on_progress)
    unrelated = unrelated_states(loaded, sites, texts=texts, batch_size=batch_size, on_progress=on_progress)
    heads = learner.heads(special_tokens(loaded), site.layer, unrelated)
    # Examples of requests take longer than facts, and tell narrow states less.
    share *= min(1.0, (site.d / _NARROW) ** 2)
    gate, mentioned = train_request_gate(
        loaded, sites, heads, share=share, batch_size=batch_size, on_progress=on_progress
    )
    gate_layer = None if sites.gate is None else torch.tensor([sites.gate.layer])
    return replace(heads, request_gate=gate, mentioned=mentioned, gate_layer=gate_layer)


def unrelated_states(
    loaded: Loaded, sites: ReadSites, *, texts: int, batch_size: int, on_progress: ProgressCallback
) -> TokenStates:
    """Return the states of unrelated texts that a router's threshold is calibrated with.

    Args:
        texts: how many unrelated texts all is learned with; a share of them is read.
    """
    plain = unrelated_texts(max(8, round(_UNRELATED * _share(sites, texts))), seed=0)
    return token_states(
        loaded, sites.router, plain, batch_size=batch_size, on_progress=on_progress, stage="unrelated text"
    )


def _share(sites: ReadSites, texts: int) -> float:
    """Return how much is learned with so many unrelated texts; of narrower states less."""
    return min(1.0, min(texts, max(_FEWEST, round(_TEXTS * (sites.router.d / _NARROW) ** 2))) / _TEXTS)


def _synthetic_facts(loaded: Loaded, share: float, rng: random.Random) -> tuple[list[_Fact], list[str]]:
    """Return facts of every kind, in grids of relations × subjects, and the texts that tell and ask them."""
    known, subjects = relations(), max(2, round(_SUBJECTS * share))
    known = known[: max(2 * _GRID, round(len(known) * share))]
    trained = usable_forms(loaded.tokenizer, trained=True)
    plain = [form for form in trained if form.name in ("bare", "question", "chat")]
    facts: list[_Fact] = []
    texts: list[str] = []

    def written(wording: str, form: Form, subject: str) -> int:
        question = wording.replace("{}", subject)
        way = rng.random()
        if form.name != "bare" and way < _CAPITALS:
            question = question.upper()
        elif form.name != "bare" and way > 1 - _KEYWORDS:
            question = keywords(question, subject, rng.choice(("first", "last", "asked"))) or question
        texts.append(form.render(loaded.tokenizer, question))
        return len(texts) - 1

    for kind in dict.fromkeys(relation.kind for relation in known):
        names = made_up_subjects(kind, subjects, rng)
        for number, relation in enumerate(known):
            if relation.kind != kind:
                continue
            for place, name in enumerate(names):
                wordings = rng.sample(relation.wordings, _EDIT_PROMPTS + _QUERY_PROMPTS)
                ways = [forms()["bare"], rng.choice(plain), *rng.choices(trained, k=_QUERY_PROMPTS)]
                made = [written(*pair, name) for pair in zip(wordings, ways, strict=True)]
                facts.append(_Fact(kind, number, place, tuple(made[:_EDIT_PROMPTS]), tuple(made)))
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
        self.sizes = torch.bincount(read.text.to(device), minlength=texts)
        spaced = torch.linspace(0, len(self.states) - 1, min(len(self.states), 20_000)).long()
        sample = self.states[spaced].float()
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-6)
        self.basis = torch.linalg.svd((sample[:4000] - self.mean) / self.scale, full_matrices=False)[2]

    def batch(self, texts: Sequence[int]) -> _Batch:
        """Return the tokens of some texts."""
        chosen = torch.tensor(texts, device=self.sizes.device)
        rows, text = rows_of(chosen, self.sizes)
        return _Batch((self.states[rows].float() - self.mean) / self.scale, text, len(chosen))


class _ProjectionTrainer(nn.Module):
    """The heads while they are learned; they begin as the leading directions of the states."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__()
        width = min(_WIDTH, *pool.basis.shape)
        self.proj_weight = nn.Parameter(pool.basis[:width].repeat(2, 1, 1))
        self.token_weight = nn.Parameter(pool.mean.new_zeros(2, pool.basis.shape[1]))
        self.token_bias = nn.Parameter(pool.mean.new_zeros(2))
        self.logit_offset = nn.Parameter(pool.mean.new_full((2,), 0.6))
        self.log_logit_scale = nn.Parameter(pool.mean.new_full((2,), 2.5))
        self.contrast = nn.Parameter(pool.mean.new_full((2,), 2.5))
        self.mean, self.scale = pool.mean, pool.scale

    def scores(self, edit_prompts: _Batch, queries: _Batch) -> Tensor:
        """Return how near each told prompt's tokens come to those of each asked one, for both heads: (2, N, M)."""
        scores = []
        for head in range(2):
            projected = F.normalize(edit_prompts.states @ self.proj_weight[head].T, dim=-1)
            cosines = projected @ F.normalize(queries.states @ self.proj_weight[head].T, dim=-1).T
            max_cosine = cosines.new_full((len(projected), queries.count), -1.0)
            max_cosine = max_cosine.scatter_reduce(1, queries.text.expand_as(cosines), cosines, "amax")
            weights = F.softplus(edit_prompts.states @ self.token_weight[head] + self.token_bias[head])
            whole = weights.new_zeros(edit_prompts.count).index_add(0, edit_prompts.text, weights)
            shares = weights / whole[edit_prompts.text].clamp(min=1e-6)
            scores.append(
                max_cosine.new_zeros(edit_prompts.count, queries.count).index_add(
                    0, edit_prompts.text, max_cosine * shares[:, None]
                )
            )
        return torch.stack(scores)

    def heads(self, special_token_ids: Tensor, layer: int, unrelated: TokenStates) -> RouterHeads:
        """Return the trained parameters, rescaled for states that are not standardised."""
        proj_weight, token_weight = (part.detach() / self.scale for part in (self.proj_weight, self.token_weight))
        proj_bias = -(proj_weight @ self.mean)
        token_bias = self.token_bias.detach() - token_weight @ self.mean
        logit_scale, logit_offset = self.log_logit_scale.detach().exp(), self.logit_offset.detach().clone()
        return RouterHeads(
            proj_weight.cpu(),
            proj_bias.cpu(),
            token_weight.cpu(),
            token_bias.cpu(),
            logit_scale.cpu(),
            logit_offset.cpu(),
            special_token_ids,
            torch.tensor([layer]),
            unrelated.states,
            unrelated.text,
        )


def _train(
    learner: _ProjectionTrainer,
    pool: _Pool,
    facts: Sequence[_Fact],
    steps: int,
    rng: random.Random,
    on_progress: ProgressCallback,
) -> None:
    groups = [
        {"params": [learner.proj_weight, learner.token_weight, learner.token_bias], "lr": _RATE},
        {"params": [learner.logit_offset, learner.log_logit_scale, learner.contrast], "lr": _LOGIT_RATE},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.4 * steps)))
    for step in range(steps):
        sampled = _sampled_facts(facts, rng)
        edit_prompts = [rng.choice(fact.edit_prompts) for fact in sampled]
        queries = [
            rng.choice([text for text in fact.query_prompts if text != own])
            for fact, own in zip(sampled, edit_prompts, strict=True)
        ]
        loss = _loss(learner, learner.scores(pool.batch(edit_prompts), pool.batch(queries)), sampled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_progress(Event("router", step + 1, steps, f"loss {float(loss.detach()):.2f}"))


def _sampled_facts(facts: Sequence[_Fact], rng: random.Random) -> list[_Fact]:
    """Return a grid of relations × subjects of one kind, and some facts of any kind beside it."""
    kind = rng.choice(facts).kind
    own = [fact for fact in facts if fact.kind == kind]
    asked, about = sorted({fact.relation for fact in own}), sorted({fact.subject for fact in own})
    asked = rng.sample(asked, min(_GRID, len(asked)))
    about = rng.sample(about, min(_GRID, len(about)))
    grid = [fact for fact in own if fact.relation in asked and fact.subject in about]
    return list(dict.fromkeys([*grid, *rng.sample(facts, min(_EXTRA_FACTS, len(facts)))]))


def _loss(learner: _ProjectionTrainer, scores: Tensor, facts: Sequence[_Fact]) -> Tensor:
    """Return the loss of scores (2, N, N): contrastive for subjects and for relations, with the cross-entropy of the
    probabilities of each and of both.
    """
    same = torch.tensor(
        [
            [[(one.kind, one.subject) == (other.kind, other.subject) for other in facts] for one in facts],
            [[one.relation == other.relation for other in facts] for one in facts],
        ],
        device=scores.device,
    )
    logits = learner.log_logit_scale.exp()[:, None, None] * (scores - learner.logit_offset[:, None, None])
    total = scores.new_zeros(())
    for head in range(2):
        total = total + _PROBABILITY_WEIGHT * _probability_loss(logits[head], same[head])
        total = total + _contrastive_loss(scores[head] * learner.contrast[head].exp(), same[head])
    both = F.logsigmoid(logits).sum(0).exp().clamp(1e-6, 1 - 1e-6)
    alike = same.all(0).float()
    weight = 1 + alike * (len(facts) / 4)
    return total + _PROBABILITY_WEIGHT * F.binary_cross_entropy(both, alike, weight=weight)


def _probability_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Return the cross-entropy of probabilities, in which the few pairs that are the same count for more."""
    wanted = same.float()
    return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=(1 - wanted).sum() / wanted.sum() / 4)


def _contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Return InfoNCE in both directions, where several may be the same."""
    own = logits.masked_fill(~same, -1e9)
    return sum(((logits.logsumexp(side) - own.logsumexp(side)).mean() for side in (0, 1)), logits.new_zeros(()))
