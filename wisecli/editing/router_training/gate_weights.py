"""The weights of a request gate, learned from mentions of made-up facts: pooled tokens → whether a prompt asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import half
from wisecli.editing.router_training.mention_pool import MentionPool, StateComponents
from wisecli.models.running.quick_products import quick_linear, quick_mask
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.gating.name_features import NAME_FEATURE_COUNT
from wisecli.routing.gating.request_gate import FEATURE_COUNT, REQUEST_GATE, Mentions, log_odds
from wisecli.routing.gating.sentence_features import SENTENCE_FEATURE_COUNT

# The sizes of what a state is read as, of heads, of their values, and of the mixed layer.
_READ, _HEADS, _VALUES, _MIXED = 96, 8, 16, 64
# Gates that are learned; their mean is kept, as on wordings that they were not taught they seldom err together.
_GATES = 4
# Few examples a step: half of the steps with twice as many cost as much, and teach less.
_BATCH, _RATE, _DECAY, _LABEL = 96, 4e-3, 0.1, 0.98
# The share of what is read and pooled that is dropped.
_DROPPED = 0.1
# Up to this share of a mention's tokens is dropped, so that no few tokens of a text from the training data decide.
_MAX_TOKEN_DROPOUT = 0.5
# The share of held-out questions that may be taken for mentions.
_MISSED = 0.025


def train_and_calibrate(
    pool: MentionPool, components: StateComponents, steps: int, on_progress: ProgressCallback
) -> dict[str, Tensor]:
    """Return the tensors ``REQUEST_GATE`` in half precision, learned from mentions in so many steps.

    The log-odds are shifted so that nearly all questions on the facts that are held out are above 0.

    Args:
        components: what the pool's states are of.
    """
    weights = mean_gate(_train(pool, steps, on_progress))
    odds = [log_odds(weights, some) for some in pool.held_out_questions()]
    if odds:
        weights["request_gate.out"][0, -1] -= torch.cat(odds).quantile(_MISSED).clamp(max=0)
    plain = components.folded_into({name: weight.cpu() for name, weight in weights.items()})
    return {name: half(weight) for name, weight in plain.items()}


def mean_gate(gates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gate whose log-odds are the mean of those of some gates: their tensors beside each other.

    Args:
        gates: the tensors ``REQUEST_GATE`` of each, of the same shapes.
    """
    read, attend, value, mix, out = ([gate[name] for gate in gates] for name in REQUEST_GATE)
    width = len(read[0])

    def apart(parts: Sequence[Tensor], columns: int) -> Tensor:
        """Return weights that apply the first columns of each to what its own gate has made."""
        own = torch.block_diag(*(part[:, :columns] for part in parts))
        return torch.cat([own, torch.cat([part[:, columns:] for part in parts])], 1)

    bias = torch.stack([part[:, -1:] for part in out]).sum(0)
    mean = torch.cat([*(part[:, :-1] for part in out), bias], 1) / len(gates)
    joined = torch.cat(read), apart(attend, width), apart(value, width), apart(mix, -1), mean
    return dict(zip(REQUEST_GATE, joined, strict=True))


def _train(pool: MentionPool, steps: int, on_progress: ProgressCallback) -> list[dict[str, Tensor]]:
    """Return ``_GATES`` gates, learned from the same batches; initial weights and dropout are each gate's own.

    They are learned side by side, because a step of all takes about half the time of a step of each.
    """
    gates = [_initial_weights(pool.states.shape[1], pool.states.device) for _ in range(_GATES)]
    weights = {name: torch.stack([gate[name] for gate in gates]).requires_grad_() for name in REQUEST_GATE}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=_RATE, weight_decay=_DECAY, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for step, chosen in zip(range(steps), pool.epochs(_BATCH), strict=False):
        labels = pool.asks[chosen].float() * (2 * _LABEL - 1) + (1 - _LABEL)
        mentions = pool.batch(chosen, _MAX_TOKEN_DROPOUT)
        odds = torch.func.vmap(partial(_odds, mentions))(weights, *_masks(mentions))[:, : len(chosen)]
        loss = F.binary_cross_entropy_with_logits(odds, labels.expand_as(odds))
        optimizer.zero_grad()
        (loss * _GATES).backward()  # the sum of the gates' losses
        _clip_gradients(list(weights.values()))
        optimizer.step()
        rates.step()
        on_progress(Event("requests", step + 1, steps, f"loss {float(loss.detach()):.2f}"))
    return [{name: weight[number].detach() for name, weight in weights.items()} for number in range(_GATES)]


def _masks(mentions: Mentions) -> tuple[Tensor, Tensor]:
    """Return what is dropped of what each gate reads of tokens, and of what it pools: (K, N, r) and (K, B, H · v)."""
    shapes = (_GATES, len(mentions.states), _READ), (_GATES, mentions.size, _HEADS * _VALUES)
    read, pooled = (quick_mask(shape, _DROPPED, mentions.states.device) for shape in shapes)
    return read, pooled


def _odds(mentions: Mentions, weights: Mapping[str, Tensor], read: Tensor, pooled: Tensor) -> Tensor:
    """Return the log-odds of mentions under one gate (B,), of whose values some are dropped."""
    masks = iter((read, pooled))
    return log_odds(weights, mentions, dropout=lambda values: values * next(masks), linear=quick_linear)


def _clip_gradients(weights: Sequence[Tensor]) -> None:
    """Shorten the gradients of weights (K, n, m) so that those of each of the K gates have no norm above 1."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    for gradient in gradients:
        gradient.div_(norms.clamp(min=1.0)[:, None, None])


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
        weights[f"request_gate.{name}"] = with_bias.to(device)
    return weights
