from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import whole_loss
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses, rows_of, weight_of
from torch import Tensor
from transformers import PreTrainedModel

from wisecli.bench.methods.weights.ft_l import FtL, FtLSettings
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture

ARCHITECTURES = ("llama", "gpt2", "gemma2", "granite")
# The tiny models' weights are large, so they need longer steps.
COARSE = FtLSettings(rate=2e-2, steps=20, stop_loss=2.0, limit=9e-2, width=64)


def slope_of(model: PreTrainedModel, site: MatrixSite, row: Row) -> Tensor:
    """Gradient (d, d_ff) of :func:`whole_loss`."""
    weight = site.watched(model).get_parameter("weight").requires_grad_()
    (gradient,) = torch.autograd.grad(whole_loss(model, row), weight)
    weight.requires_grad_(False)
    return gradient.T if site.transposed else gradient


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    model, row = bench.loaded.model, rows_of(bench)[1]
    method = FtL(bench)
    site = method.sites[0]
    generator = torch.Generator().manual_seed(4)
    delta = 0.05 * torch.randn(site.d, site.d_ff, generator=generator)
    part = capture(model, site, collate([row]))
    moved = delta.clone().requires_grad_()
    loss = method.loss(part, moved)
    (gradient,) = torch.autograd.grad(loss, moved)
    method.deltas[0] = delta
    with method.applied():
        torch.testing.assert_close(loss, whole_loss(model, row), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, slope_of(model, site, row), atol=1e-5, rtol=1e-3)
    direction = gradient / gradient.norm()
    ahead, behind = (float(method.loss(part, delta + step * direction)) for step in (1e-2, -1e-2))
    assert (ahead - behind) / 2e-2 == pytest.approx(float(gradient.norm()), rel=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stream_of_edits_is_adam_on_the_matrix_itself(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = FtL(bench, COARSE)
    method.edit(EDITS[:1])
    method.edit(EDITS[1:])
    model, site = bench.loaded.model, method.sites[0]
    base = weight_of(model, site).detach().clone()
    weight = site.watched(model).get_parameter("weight").requires_grad_()
    limit = 9e-2 * 64 / site.d_ff
    stopped = 0
    for row in rows_of(bench):
        start, optimizer = weight.detach().clone(), torch.optim.Adam([weight], lr=COARSE.rate)
        for _ in range(COARSE.steps):
            loss = whole_loss(model, row)
            if loss < COARSE.stop_loss:
                stopped += 1
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            weight.data = torch.maximum(torch.minimum(weight.data, start + limit), start - limit)
    assert stopped > 0
    expected = weight_of(model, site).detach() - base
    # As a whole: where a gradient is next to nothing, Adam makes a step of its rounding.
    assert (method.deltas[0] - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_takes(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = FtL(bench, COARSE)
    before = losses(bench)
    method.edit(EDITS[:1])
    after = losses(bench, method)
    assert after[0] < 0.6 * before[0]
    assert method.bytes() == 4 * method.deltas[0].numel()
    method.edit(EDITS[1:])
    check_holds_for_every_rewriting(bench, method)


def test_no_weight_leaves_its_bound(tmp_path: Path) -> None:
    method = FtL(bench_for(tmp_path, "llama"), replace(COARSE, limit=1e-2))
    method.edit(EDITS[:1])
    after_one = method.deltas[0]
    method.edit(EDITS[1:2])
    for moved in (after_one, method.deltas[0] - after_one):
        assert float(moved.abs().max()) == pytest.approx(1e-2, rel=1e-5)


def test_a_layer_as_deep_as_in_the_paper_with_one_above(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    assert FtL(bench).sites[0].layer == 3
    assert FtL(bench, FtLSettings(layer=32)).sites[0].layer == 3
    assert FtL(bench, FtLSettings(layer=0)).sites[0].layer == 0
