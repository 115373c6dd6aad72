"""The weights of a request gate, learned from mentions of made-up facts: pooled tokens → whether a prompt asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import half
from wisecli.models.running.grouped_rows import rows_of
from wisecli.models.running.quick_products import quick_linear
from wisecli.models.synthetic.request_examples import Example
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.gating.name_features import NAME_FEATURE_COUNT
from wisecli.routing.gating.request_gate import FEATURE_COUNT, REQUEST_GATE, Mention, Mentions, log_odds
from wisecli.routing.gating.sentence_features import SENTENCE_FEATURE_COUNT

# The share of the facts that are held out, to set where the gate opens.
_HELD_OUT = 0.15
# Principal components of states; the sizes of what one is read as, of heads, of their values, and of the mixed layer.
_COMPONENTS, _READ, _HEADS, _VALUES, _MIXED = 288, 96, 8, 16, 64
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
# Mentions that are looked at together; tokens of a step are filled up to a multiple of so many.
_EVAL_BATCH, _ROUNDED = 256, 512


class _Standardized:
    """Maps states to their leading principal components, standardised."""

    def __init__(self, mentions: Sequence[Mention]) -> None:
        sample = torch.cat([one.states for one in mentions[:: max(1, len(mentions) // 800)]]).float()
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-3)
        spaced = torch.linspace(0, len(sample) - 1, min(len(sample), 4000)).long()
        basis = torch.linalg.svd((sample[spaced] - self.mean) / self.scale, full_matrices=False)[2]
        self.basis = basis[:_COMPONENTS]

    def __call__(self, states: Tensor) -> Tensor:
        """Return states (n, d) mapped: (n, k)."""
        mapped: Tensor = ((states - self.mean) / self.scale) @ self.basis.T
        return mapped

    def folded_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that apply to states which are not mapped."""
        read = weights["request_gate.read"]
        plain = (read[:, :-1] @ self.basis) / self.scale
        return {**weights, "request_gate.read": torch.cat([plain, (read[:, -1] - plain @ self.mean)[:, None]], 1)}


class _Pool:
    """Mentions one behind the other, their states mapped, of which batches are taken by number.

    ``asks`` says whether each asks its fact (M,), ``held_out`` whether that fact is held out (M,).

    Args:
        mapped: what states are mapped by.
        first_held_out: the number of the first fact that is held out.
    """

    def __init__(
        self, mentions: Sequence[Mention], examples: Sequence[Example], mapped: _Standardized, first_held_out: int
    ) -> None:
        parts = [mentions[first : first + _EVAL_BATCH] for first in range(0, len(mentions), _EVAL_BATCH)]
        self.states = torch.cat([mapped(torch.cat([one.states for one in part])).half() for part in parts])
        self.features = torch.cat([one.features for one in mentions])
        device = self.states.device
        self.sizes = torch.tensor([len(one.states) for one in mentions], device=device)
        self.asks = torch.tensor([one.asks for one in examples], device=device)
        self.held_out = torch.tensor([one.fact >= first_held_out for one in examples], device=device)

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

    def epochs(self) -> Iterator[Tensor]:
        """Yield the numbers of batches of those that may be learned from, if any, all in turn and then anew."""
        numbers = (~self.held_out).nonzero()[:, 0]
        while len(numbers):
            order = numbers[torch.randperm(len(numbers)).to(numbers.device)]
            # The last batch of a round is left out where it is smaller.
            yield from (some for some in order.split(_BATCH) if len(some) == min(_BATCH, len(numbers)))


def train_and_calibrate(
    mentions: Sequence[Mention], examples: Sequence[Example], facts: int, steps: int, on_progress: ProgressCallback
) -> dict[str, Tensor]:
    """Return the tensors ``REQUEST_GATE`` in half precision, learned from mentions of so many facts in so many steps.

    A share of the facts is held out: the log-odds are shifted so that nearly all questions on those are above 0.

    Args:
        examples: what each mention is of.
    """
    standardized = _Standardized(mentions)
    pool = _Pool(mentions, examples, standardized, round(facts * (1 - _HELD_OUT)))
    weights = mean_gate(_train(pool, steps, on_progress))
    odds = [log_odds(weights, some) for some in pool.held_out_questions()]
    if odds:
        weights["request_gate.out"][0, -1] -= torch.cat(odds).quantile(_MISSED).clamp(max=0)
    return {name: half(weight).cpu() for name, weight in standardized.folded_into(weights).items()}


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


def _train(pool: _Pool, steps: int, on_progress: ProgressCallback) -> list[dict[str, Tensor]]:
    """Return ``_GATES`` gates, learned from the same batches; initial weights and dropout are each gate's own.

    They are learned side by side, because a step of all takes about half the time of a step of each.
    """
    gates = [_initial_weights(pool.states.shape[1], pool.states.device) for _ in range(_GATES)]
    weights = {name: torch.stack([gate[name] for gate in gates]).requires_grad_() for name in REQUEST_GATE}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=_RATE, weight_decay=_DECAY, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    dropout = partial(F.dropout, p=_DROPPED)
    for step, chosen in zip(range(steps), pool.epochs(), strict=False):
        labels = pool.asks[chosen].float() * (2 * _LABEL - 1) + (1 - _LABEL)
        mentions = pool.batch(chosen, _MAX_TOKEN_DROPOUT)
        of_each = partial(log_odds, mentions=mentions, dropout=dropout, linear=quick_linear)
        odds = torch.func.vmap(of_each, randomness="different")(weights)[:, : len(chosen)]
        loss = F.binary_cross_entropy_with_logits(odds, labels.expand_as(odds))
        optimizer.zero_grad()
        (loss * _GATES).backward()  # the sum of the gates' losses
        _clip_gradients(list(weights.values()))
        optimizer.step()
        rates.step()
        on_progress(Event("requests", step + 1, steps, f"loss {float(loss.detach()):.2f}"))
    return [{name: weight[number].detach() for name, weight in weights.items()} for number in range(_GATES)]


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
