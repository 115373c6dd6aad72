from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import hooked, keys_of, random_rows, whole_loss
from support.rivals import (
    EDITS,
    encoded,
    require_batches_and_caches_change_nothing,
    require_untouched_outside,
    snapshot,
    tiny_bench,
    whole,
)
from torch import Tensor, nn

from wisecli.bench.methods.adapters.defer import Defer, DeferSettings
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture

ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
# The middle layer of five; the tiny models' weights are large, so they need longer steps.
SHORT = DeferSettings(layer=2, of=5, rate=0.05, steps=30)


def defer_on(directory: Path, architecture: str, settings: DeferSettings = SHORT) -> Defer:
    return Defer(tiny_bench(directory, architecture), settings)


class Pair(nn.Module):
    """The paper's two models, apart, by torch's own layers."""

    def __init__(self, defer: Defer) -> None:
        super().__init__()
        site = defer.site
        self.scope, self.counterfactual = nn.Linear(site.d_ff, 1), nn.Linear(site.d_ff, site.d)
        with torch.no_grad():
            self.scope.weight.copy_(defer.weight[:1])
            self.scope.bias.copy_(defer.bias[:1])
            self.counterfactual.weight.copy_(defer.weight[1:])
            self.counterfactual.bias.copy_(defer.bias[1:])

    def loss(self, defer: Defer, row: Row) -> Tensor:
        """Mean cross-entropy of a row's target by the whole model, gate and value in place from the prompt's end on."""
        end = len(row.prompt) - 1
        key = keys_of(defer.bench.loaded.model, defer.site, row.prompt)[end]

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            share = torch.sigmoid(self.scope(key))
            mixed = share * self.counterfactual(key) + (1 - share) * output[:, end:]
            return torch.cat([output[:, :end], mixed], 1)

        with hooked(defer.bench.loaded.model, defer.site, hook):
            return whole_loss(defer.bench.loaded.model, row)


@ARCHITECTURES
def test_loss_and_gradient_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    defer = defer_on(tmp_path / "model", architecture)
    row, pair = encoded(defer.bench, EDITS[1]), Pair(defer)
    part = capture(defer.bench.loaded.model, defer.site, collate([row])).from_window()
    weight, bias = defer.weight.clone().requires_grad_(), defer.bias.clone().requires_grad_()
    output = defer.site.watched(defer.bench.loaded.model)(part.keys)
    loss, expected = defer.loss(part, output, weight, bias), pair.loss(defer, row)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = [
        torch.cat([getattr(pair.scope, n).grad, getattr(pair.counterfactual, n).grad]) for n in ("weight", "bias")
    ]
    for ours, gradient in zip((weight.grad, bias.grad), gradients, strict=True):
        assert gradient.norm() > 0
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stream_of_edits_is_adam_on_both_models(tmp_path: Path, architecture: str) -> None:
    defer = defer_on(tmp_path / "model", architecture, replace(SHORT, steps=6))
    pair, start = Pair(defer), defer.weight
    defer.edit(EDITS[:1])
    defer.edit(EDITS[1:])
    for edit in EDITS:
        optimizer = torch.optim.Adam(pair.parameters(), lr=SHORT.rate)
        for _ in range(6):
            optimizer.zero_grad()
            pair.loss(defer, encoded(defer.bench, edit)).backward()
            optimizer.step()
    expected = torch.cat([pair.scope.weight, pair.counterfactual.weight]).detach() - start
    # As a whole: where a gradient is next to nothing, Adam makes a step of its rounding.
    assert (defer.weight - start - expected).norm() < 1e-3 * expected.norm()


@ARCHITECTURES
def test_an_edit_takes_and_what_the_gate_lets_pass_is_untouched_to_the_bit(tmp_path: Path, architecture: str) -> None:
    defer = defer_on(tmp_path / "model", architecture)
    before = snapshot(defer.bench)
    require_untouched_outside(defer.bench, defer, *before)  # before any edit it does nothing
    row = encoded(defer.bench, EDITS[0])
    (was,) = target_predictions(defer.bench.loaded, [row], batch_size=1)
    defer.edit(EDITS[:1])
    (now,) = target_predictions(defer.bench.loaded, [row], defer, batch_size=1)
    assert now.losses.mean() < 0.6 * was.losses.mean()
    rows = random_rows(*[(length, 1) for length in range(1, 25)], seed=5)
    keys = torch.stack([keys_of(defer.bench.loaded.model, defer.site, one.prompt)[-1] for one in rows])
    # Moved until it lets half of these prompts pass: one edit may leave it open for all.
    defer.bias[0] -= Pair(defer).scope(keys).median().detach() + 1e-4
    shut = torch.sigmoid(Pair(defer).scope(keys))[:, 0] < 0.5
    assert int(shut.sum()) == 12
    for one, passes in zip(rows, shut.tolist(), strict=True):
        assert torch.equal(whole(defer.bench, one.prompt, defer), whole(defer.bench, one.prompt)) == passes
    require_untouched_outside(defer.bench, defer, *before)
    assert defer.bytes() == 4 * (1 + defer.site.d) * (1 + defer.site.d_ff)
    assert defer.rewritten_prompt("ba") == "ba"


@ARCHITECTURES
def test_batches_and_caches_change_nothing(tmp_path: Path, architecture: str) -> None:
    defer = defer_on(tmp_path / "model", architecture)
    defer.edit(EDITS)
    require_batches_and_caches_change_nothing(defer.bench, defer)
