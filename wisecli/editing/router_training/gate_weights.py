"""The weights of a request gate, learned from mentions of made-up facts: pooled tokens → whether a prompt asks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.editing.router_training.request_examples import Example
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.deciding.name_features import NAME_FEATURE_COUNT
from wisecli.routing.deciding.request_gate import FEATURE_COUNT, Mention, Mentions, batch_mentions, log_odds
from wisecli.routing.deciding.sentence_features import SENTENCE_FEATURE_COUNT

# Which share of the facts says where the gate opens.
_APART = 0.15
# Directions of states that are looked at; numbers that one is read as, heads, values of each, and what those become.
_DIRECTIONS, _READ, _HEADS, _VALUES, _MIXED = 96, 64, 8, 32, 64
_BATCH, _RATE, _DECAY, _DROPPED, _SURE = 192, 4e-3, 0.3, 0.3, 0.98
# Up to which share of a mention's tokens is left out, so that no few of them, of a text that is known, say it all.
_LEFT_OUT = 0.8
# Which share of the questions apart from those learned from may be taken for mentions.
_LOST = 0.05
_AT_A_TIME = 256


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


def train_and_calibrate(
    mentions: Sequence[Mention],
    examples: Sequence[Example],
    facts: int,
    steps: int,
    rng: random.Random,
    on_progress: ProgressCallback,
) -> dict[str, Tensor]:
    """Return the tensors ``REQUEST_GATE``, learned from mentions of so many facts in so many steps.

    A share of the facts is not learned from: the log-odds are shifted so that nearly all questions on those are above
    nought.

    Args:
        examples: what each mention is of.
    """
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
        odds = torch.cat([log_odds(weights, batch_mentions(part)) for part in in_parts(apart)])
        weights["request_gate.out"][0, -1] -= odds.quantile(_LOST).clamp(max=0)
    return {name: weight.cpu() for name, weight in seen.folded_into(weights).items()}


def in_parts(mentions: Sequence[Mention]) -> Iterator[list[Mention]]:
    """Yield mentions some at a time, those of like length together."""
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
    seen = _READ + FEATURE_COUNT + SENTENCE_FEATURE_COUNT + NAME_FEATURE_COUNT
    pooled = _HEADS * _VALUES
    shapes = {"read": (_READ, width), "attend": (_HEADS, seen), "value": (pooled, seen)}
    shapes |= {"mix": (_MIXED, pooled), "out": (1, _MIXED)}
    drawn = {}
    for name, (rows, columns) in shapes.items():
        layer = torch.nn.Linear(columns, rows)
        whole = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        drawn[f"request_gate.{name}"] = whole.to(device).requires_grad_()
    return drawn
