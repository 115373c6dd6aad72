from pathlib import Path

import pytest
import torch
from support.every_type import save_type
from support.helpers import random_rows, save_tiny, site_of
from support.loading import CPU
from torch.nn import functional as F

from wisecli import environment
from wisecli.models.layout.site import LayerSite
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running import quick_products as module
from wisecli.models.running.activations import capture
from wisecli.models.running.quick_products import quick_dropout, quick_linear, quick_products

LAYER = 1


def test_layers_up_to_a_site_run_in_bfloat16_and_are_as_they_were_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(save_tiny(tmp_path), CPU)
    site, batch = site_of(loaded.model, LAYER), collate(random_rows((9, 2), (4, 1)))
    before = {name: (one.data_ptr(), one.detach().clone()) for name, one in loaded.model.named_parameters()}
    buffers = {name: one.clone() for name, one in loaded.model.named_buffers()}
    exact = capture(loaded.model, site, batch, above=False).hidden
    monkeypatch.setattr(module, "has_quick_bfloat16", lambda: True)
    with quick_products(loaded, site):
        types = {name: one.dtype for name, one in loaded.model.named_parameters()}
        quick = capture(loaded.model, site, batch, above=False).hidden
    assert types[f"model.layers.{LAYER}.mlp.down_proj.weight"] == quick.dtype == torch.bfloat16
    assert types[f"model.layers.{LAYER + 1}.mlp.down_proj.weight"] == torch.float32
    assert 0 < float((quick.float() - exact).norm() / exact.norm()) < 0.02
    after = {name: (one.data_ptr(), one.detach()) for name, one in loaded.model.named_parameters()}
    assert all(after[name][0] == place and torch.equal(after[name][1], one) for name, (place, one) in before.items())
    assert all(torch.equal(one, buffers[name]) for name, one in loaded.model.named_buffers())


@pytest.mark.parametrize("whole", [False, True])
def test_what_computes_in_float32_alone_runs_in_the_models_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    loaded = load_model(save_type(tmp_path, "inkling2_text"), CPU)  # its router casts states, but not its weights
    monkeypatch.setattr(module, "has_quick_bfloat16", lambda: True)
    with quick_products(loaded, None if whole else LayerSite("inkling2_text", 2, "model.layers.2", 32)):
        assert {one.dtype for one in loaded.model.parameters()} == {torch.float32}


def test_without_a_site_all_layers_run_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(save_tiny(tmp_path), CPU)
    monkeypatch.setattr(module, "has_quick_bfloat16", lambda: True)
    with quick_products(loaded):
        assert {one.dtype for one in loaded.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in loaded.model.parameters()} == {torch.float32}


def test_other_processors_run_the_models_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(save_tiny(tmp_path), CPU)
    monkeypatch.setattr(module, "has_quick_bfloat16", lambda: False)
    with quick_products(loaded, site_of(loaded.model, LAYER)):
        assert {one.dtype for one in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "quick"),
    [({"amx_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_bfloat16_is_quick_by_tiles_or_by_vectors(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], quick: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert environment.has_quick_bfloat16() is quick


def test_a_product_of_weights_that_are_learned_is_nearly_the_same_and_so_are_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = torch.Generator().manual_seed(0)
    values, *weights = (torch.randn(shape, generator=chance) for shape in ((50, 40), (8, 40), (8,)))
    found = []
    for quick in (False, True):
        monkeypatch.setattr(module, "has_quick_bfloat16", lambda quick=quick: quick)
        own = [one.clone().requires_grad_() for one in weights]
        product = quick_linear(values, *own)
        product.square().sum().backward()
        found.append((product.detach(), *(one.grad for one in own)))
    assert torch.equal(found[0][0], F.linear(values, *weights))
    for exact, near in zip(*found, strict=True):
        assert near.dtype == torch.float32
        assert 0 < float((near - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("shape", [(1000, 321), (7,), (0, 4)])
def test_a_tenth_of_all_values_is_dropped_and_the_others_make_up_for_it(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.ones(shape)
    kept = quick_dropout(values, 0.1)
    assert kept.shape == values.shape
    assert all(value in (0.0, pytest.approx(256 / 230)) for value in kept.unique().tolist())
    if len(values) > 7:
        assert float((kept == 0).float().mean()) == pytest.approx(26 / 256, abs=2e-3)
        assert float(kept.mean()) == pytest.approx(1, abs=2e-3)
        assert not torch.equal(kept, quick_dropout(values, 0.1))


def test_values_of_another_device_are_dropped_there() -> None:
    assert quick_dropout(torch.empty(3, 5, device="meta"), 0.1).device.type == "meta"
