from pathlib import Path

import pytest
import torch
from support.helpers import alone, hooked, keys_of, random_rows, save_tiny, site_of
from support.loading import CPU
from support.tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture
from wisecli.models.running.upper_layers import upper_logits

# Prompts and targets of all lengths, the longest prompts beyond tiny Mistral's window of 6.
ROWS = random_rows((1, 2), (4, 1), (11, 3), (7, 6), (2, 5))
LAYERS = (0, 2, 3)
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def by_row(model: PreTrainedModel, rows: list[Row]) -> Tensor:
    return torch.cat([alone(model, row) for row in rows])


def random_delta(site: MatrixSite) -> Tensor:
    return torch.randn(site.d, site.d_ff, generator=torch.Generator().manual_seed(5)) / site.d_ff**0.5


def layers_of(model: PreTrainedModel, site: MatrixSite) -> list[nn.Module]:
    return list(model.get_submodule(site.layer_module.rpartition(".")[0]).children())


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layers_above_on_captured_activations_give_the_whole_models_logits(variant: str, layer: int) -> None:
    model = tiny_model(variant)
    site = site_of(model, layer)
    batch = collate(ROWS)
    expected = by_row(model, ROWS)
    activations = capture(model, site, batch, select=batch.labelled)
    torch.testing.assert_close(activations.logits, expected, **TOLERANCE)
    with torch.no_grad():
        whole = upper_logits(model, site, activations, activations.hidden, batch.labelled)
        window = activations.from_window()
        cached = upper_logits(model, site, window, window.hidden, batch.labelled)
    torch.testing.assert_close(whole, expected, **TOLERANCE)
    torch.testing.assert_close(cached, expected, **TOLERANCE)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_change_of_the_matrix_at_every_token_changes_what_leaves_the_layer(variant: str, layer: int) -> None:
    model = tiny_model(variant)
    site = site_of(model, layer)
    delta, batch = random_delta(site), collate(ROWS)
    with hooked(model, site, lambda _module, inputs, output: output + inputs[0] @ delta.T):
        expected = by_row(model, ROWS)
    activations = capture(model, site, batch)
    with torch.no_grad():
        hidden = activations.with_update(activations.keys @ delta.T)
        changed = upper_logits(model, site, activations, hidden, batch.labelled)
    assert (expected - by_row(model, ROWS)).abs().max() > 0.1
    torch.testing.assert_close(changed, expected, **TOLERANCE)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_change_from_the_last_prompt_token_on_needs_the_window_only(variant: str, layer: int) -> None:
    model = tiny_model(variant)
    site = site_of(model, layer)
    delta = random_delta(site)
    expected = []
    for row in ROWS:

        def in_window(
            _module: nn.Module, inputs: tuple[Tensor], output: Tensor, start: int = len(row.prompt) - 1
        ) -> Tensor:
            changed = output.clone()
            changed[:, start:] += inputs[0][:, start:] @ delta.T
            return changed

        with hooked(model, site, in_window):
            expected.append(alone(model, row))
    batch = collate(ROWS)
    window = capture(model, site, batch).from_window()
    assert window.hidden.shape[1] == max(len(row.target) for row in ROWS)
    with torch.no_grad():
        changed = upper_logits(model, site, window, window.with_update(window.keys @ delta.T), batch.labelled)
    torch.testing.assert_close(changed, torch.cat(expected), **TOLERANCE)


@pytest.mark.parametrize("window", [False, True])
def test_some_of_the_rows_give_what_they_give_among_all(architecture: str, window: bool) -> None:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    activations = capture(model, site, collate(ROWS))
    part = (activations.from_window() if window else activations).rows(torch.tensor([3, 0]))
    with torch.no_grad():
        logits = upper_logits(model, site, part, part.hidden, part.batch.labelled)
    torch.testing.assert_close(logits, by_row(model, [ROWS[3], ROWS[0]]), **TOLERANCE)


def test_keys_are_the_inputs_of_the_value_module(architecture: str) -> None:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    batch = collate(ROWS)
    keys = capture(model, site, batch).keys
    for index, row in enumerate(ROWS):
        expected = keys_of(model, site, [*row.prompt, *row.target[:-1]])
        torch.testing.assert_close(keys[index][batch.mask[index].bool()], expected, rtol=1e-5, atol=1e-5)


def test_without_the_layers_above_keys_and_hidden_states_are_the_same(architecture: str) -> None:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    batch = collate(ROWS)
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
        for layer in model.get_submodule(f"{site.layer_module.rpartition('.')[0]}.3").children()
    ]
    short = capture(model, site, batch, above=False)
    assert not ran
    whole = capture(model, site, batch)
    assert ran
    for handle in handles:
        handle.remove()
    assert torch.equal(short.keys, whole.keys)
    assert torch.equal(short.hidden, whole.hidden)


def test_no_logits_are_computed_that_nobody_selected(architecture: str) -> None:
    model = tiny_model(architecture)
    assert capture(model, site_of(model, 2), collate(ROWS)).logits.shape == (0, VOCABULARY)


def test_the_model_is_as_before_afterwards(architecture: str) -> None:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    before, hooks = alone(model, ROWS[2]), hook_count(model)
    batch = collate(ROWS)
    capture(model, site, batch, above=False)
    activations = capture(model, site, batch, select=batch.labelled).from_window()
    with torch.no_grad():
        upper_logits(model, site, activations, torch.zeros_like(activations.hidden), batch.labelled)
    assert all("forward" not in vars(layer) for layer in layers_of(model, site))
    assert hook_count(model) == hooks
    assert torch.equal(alone(model, ROWS[2]), before)


@pytest.mark.parametrize("stage", ["capture", "capture below only", "suffix"])
def test_the_model_is_as_before_after_an_exception_too(architecture: str, stage: str) -> None:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    before = alone(model, ROWS[2])
    batch = collate(ROWS)
    activations = capture(model, site, batch)

    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    handle = model.get_output_embeddings().register_forward_hook(fail)
    hooks = hook_count(model)
    with pytest.raises(RuntimeError, match="power cut"):
        if stage == "suffix":
            upper_logits(model, site, activations, activations.hidden, batch.labelled)
        else:
            capture(model, site, batch, above=stage == "capture")
    assert hook_count(model) == hooks
    handle.remove()
    assert all("forward" not in vars(layer) for layer in layers_of(model, site))
    assert torch.equal(alone(model, ROWS[2]), before)


@pytest.mark.parametrize("window", [False, True])
def test_gradients_agree_with_finite_differences(window: bool) -> None:
    model = tiny_model("gpt2").double()  # Llama's norms compute in float32
    model.requires_grad_(False)
    site = site_of(model, 2)
    batch = collate(ROWS)
    activations = capture(model, site, batch)
    activations = activations.from_window() if window else activations
    labels = batch.labels[batch.labels >= 0]

    def loss(delta: Tensor) -> Tensor:
        hidden = activations.with_update(activations.keys @ delta.T)
        logits = upper_logits(model, site, activations, hidden, batch.labelled)
        return nn.functional.cross_entropy(logits, labels)

    generator = torch.Generator().manual_seed(7)
    delta = (0.1 * torch.randn(site.d, site.d_ff, generator=generator, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    for _ in range(5):
        direction = torch.randn(site.d, site.d_ff, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            difference = (loss(delta + 1e-5 * direction) - loss(delta - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_no_parameter_of_a_loaded_model_gets_a_gradient(tmp_path: Path, architecture: str) -> None:
    model = load_model(save_tiny(tmp_path / "model", architecture), load=CPU).model
    site = site_of(model, 2)
    batch = collate(ROWS)
    window = capture(model, site, batch).from_window()
    hidden = window.hidden.clone().requires_grad_()
    upper_logits(model, site, window, hidden, batch.labelled).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
