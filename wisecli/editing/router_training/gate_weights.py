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

# The share of the facts that are held out, to set where the gate opens.
_HELD_OUT = 0.15
# Principal components of states; the sizes of what one is read as, of heads, of their values, and of the mixed layer.
_COMPONENTS, _READ, _HEADS, _VALUES, _MIXED = 288, 64, 8, 32, 64
_BATCH, _RATE, _DECAY, _DROPOUT, _LABEL = 192, 4e-3, 0.3, 0.3, 0.98
# Up to this share of a mention's tokens is dropped, so that no few tokens of a text from the training data decide.
_MAX_TOKEN_DROPOUT = 0.8
# The share of held-out questions that may be taken for mentions.
_MISSED = 0.05
_EVAL_BATCH = 256


class _Standardized:
    """Maps states to their leading principal components, standardised."""

    def __init__(self, mentions: Sequence[Mention]) -> None:
        sample = torch.cat([one.states for one in mentions[:: max(1, len(mentions) // 800)]]).float()
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-3)
        spaced = torch.linspace(0, len(sample) - 1, min(len(sample), 4000)).long()
        basis = torch.linalg.svd((sample[spaced] - self.mean) / self.scale, full_matrices=False)[2]
        self.basis = basis[:_COMPONENTS]

    def __call__(self, mention: Mention) -> Mention:
        """Return a mention with its states mapped."""
        return mention._replace(states=((mention.states - self.mean) / self.scale) @ self.basis.T)

    def folded_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that apply to states which are not mapped."""
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

    A share of the facts is held out: the log-odds are shifted so that nearly all questions on those are above 0.

    Args:
        examples: what each mention is of.
    """
    standardized = _Standardized(mentions)
    inputs = [standardized(one) for one in mentions]
    first_held_out = round(facts * (1 - _HELD_OUT))
    weights = _train(
        [(one, example.asks) for one, example in zip(inputs, examples, strict=True) if example.fact < first_held_out],
        steps,
        rng,
        on_progress,
    )
    held_out = [
        one for one, example in zip(inputs, examples, strict=True) if example.fact >= first_held_out and example.asks
    ]
    if held_out:
        odds = torch.cat([log_odds(weights, batch_mentions(part)) for part in _in_parts(held_out)])
        weights["request_gate.out"][0, -1] -= odds.quantile(_MISSED).clamp(max=0)
    return {name: weight.cpu() for name, weight in standardized.folded_into(weights).items()}


def _in_parts(mentions: Sequence[Mention]) -> Iterator[list[Mention]]:
    """Yield batches of mentions, those of like length together."""
    order = sorted(mentions, key=lambda one: len(one.states))
    for first in range(0, len(order), _EVAL_BATCH):
        yield order[first : first + _EVAL_BATCH]


def _train(
    examples: Sequence[tuple[Mention, bool]], steps: int, rng: random.Random, on_progress: ProgressCallback
) -> dict[str, Tensor]:
    device = examples[0][0].states.device
    weights = _initial_weights(examples[0][0].states.shape[1], device)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=_RATE, weight_decay=_DECAY)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for step in range(steps):
        chosen = rng.sample(examples, min(_BATCH, len(examples)))
        labels = torch.tensor([_LABEL if asks else 1 - _LABEL for _, asks in chosen], device=device)
        odds = log_odds(weights, _drop_tokens(batch_mentions([mention for mention, _ in chosen])), _dropout)
        loss = F.binary_cross_entropy_with_logits(odds, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        rates.step()
        on_progress(Event("requests", step + 1, steps, f"loss {float(loss.detach()):.2f}"))
    return {name: value.detach() for name, value in weights.items()}


def _drop_tokens(mentions: Mentions) -> Mentions:
    """Return mentions without some of their tokens, of each a share of its own."""
    device = mentions.mention_index.device
    share = _MAX_TOKEN_DROPOUT * torch.rand(mentions.size, device=device)
    kept = torch.rand(len(mentions.mention_index), device=device) >= share[mentions.mention_index]
    return Mentions(mentions.states[kept], mentions.features[kept], mentions.mention_index[kept], mentions.size)


def _dropout(values: Tensor) -> Tensor:
    return F.dropout(values, _DROPOUT)


def _initial_weights(width: int, device: torch.device) -> dict[str, Tensor]:
    """Return initial weights: those of torch's linear layers, with the bias as the last column."""
    inputs = _READ + FEATURE_COUNT + SENTENCE_FEATURE_COUNT + NAME_FEATURE_COUNT
    pooled = _HEADS * _VALUES
    shapes = {"read": (_READ, width), "attend": (_HEADS, inputs), "value": (pooled, inputs)}
    shapes |= {"mix": (_MIXED, pooled), "out": (1, _MIXED)}
    weights = {}
    for name, (rows, columns) in shapes.items():
        layer = torch.nn.Linear(columns, rows)
        with_bias = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        weights[f"request_gate.{name}"] = with_bias.to(device).requires_grad_()
    return weights
