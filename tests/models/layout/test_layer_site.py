"""Edits behind decoder layers, held against the whole, unsplit model with a hook on the layer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.every_type import save_type, tiny
from support.helpers import alone, random_rows, save_tiny
from support.loading import CPU
from support.tiny_models import TINY_CONFIGS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from wisecli.errors import ModelError, SettingsError, WrongBaseError
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.site import LayerSite, MatrixSite, find_site, fingerprint
from wisecli.models.layout.site_probe import above_of, decoder_of, require_known_context, verified_layout
from wisecli.models.loading import load_model, require_base
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import capture, captured
from wisecli.models.running.hooks import hooked
from wisecli.models.running.upper_layers import upper_logits

ROWS = random_rows((4, 1), (11, 3), (7, 4))
# How the layers above run by themselves, of a type each: attention alone, a mixture, recurrent states, both, keys and
# values that upper layers share with lower ones, and several streams.
ABOVE = {
    "llama": "cached",
    "qwen3_moe": "cached",
    "opt": "cached",
    "mamba2": "rows",
    "falcon_h1": "rows",
    "gemma3n_text": "all",
    "hy_v4": "all",
    "qwen4_exp_text": "rows",
}
FEW = ["llama", "falcon_h1", "gemma3n_text"]


def behind(directory: Path, model_type: str) -> tuple[PreTrainedModel, LayerSite]:
    """A saved and loaded model, and the site behind its layer 2."""
    save_type(directory, model_type)
    loaded, checkpoint = load_model(directory, CPU), Checkpoint(directory)
    layout = replace(find_layout(directory, checkpoint, lookup=True), known=False)
    layout = verified_layout(loaded.model, directory, checkpoint, layout, 2)
    site = find_site(directory, checkpoint, 2, layout)
    assert isinstance(site, LayerSite)
    return loaded.model, site


def added(model: PreTrainedModel, site: LayerSite, shift: Tensor, first: int) -> AbstractContextManager[None]:
    """The whole model with something (T, d) added to what leaves the layer, in all its streams, from a column on."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        changed = states.clone()
        for stream in [changed] if site.streams is None else changed.unbind(site.streams):
            stream[:, first:] += shift[: stream.shape[1] - first]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hooked(model.get_submodule(site.layer_module).register_forward_hook(hook))


@pytest.mark.parametrize("model_type", ABOVE)
def test_what_is_added_behind_a_layer_does_what_it_does_in_the_whole_model(tmp_path: Path, model_type: str) -> None:
    model, site = behind(tmp_path, model_type)
    assert site.above == ABOVE[model_type]
    shift = 2 * torch.randn(4, site.d, generator=torch.Generator().manual_seed(2))
    expected, plain = [], torch.cat([alone(model, row) for row in ROWS])
    for row in ROWS:
        with added(model, site, shift, len(row.prompt) - 1):
            expected.append(alone(model, row))
    batch = collate(ROWS)
    window = capture(model, site, batch).from_window()
    with torch.no_grad():
        hidden = window.with_update(shift[: window.hidden.shape[1]].expand_as(window.hidden))
        changed = upper_logits(model, site, window, hidden, batch.labelled)
    assert (torch.cat(expected) - plain).abs().max() > 0.1
    torch.testing.assert_close(changed, torch.cat(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("model_type", FEW)
def test_keys_are_the_states_that_leave_the_layer(tmp_path: Path, model_type: str) -> None:
    model, site = behind(tmp_path, model_type)
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states if site.streams is None else states.select(site.streams, 0))

    batch = collate(ROWS)
    keys = capture(model, site, batch).keys
    for index, row in enumerate(ROWS):
        handle = model.get_submodule(site.layer_module).register_forward_hook(keep)
        alone(model, row)
        handle.remove()
        torch.testing.assert_close(keys[index][batch.mask[index].bool()], kept[-1][0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("model_type", FEW)
def test_some_rows_and_shared_beginnings_change_nothing(tmp_path: Path, model_type: str) -> None:
    model, site = behind(tmp_path, model_type)
    begun = [replace(row, prompt=(*range(3, 40), *row.prompt)) for row in ROWS]
    (shared,) = captured(model, site, [collate(begun)], window=True, shared=True)
    part = shared.rows(torch.tensor([2, 0]))
    with torch.no_grad():
        logits = upper_logits(model, site, part, part.hidden, part.batch.labelled)
    expected = torch.cat([alone(model, begun[2]), alone(model, begun[0])])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


def test_gradients_reach_what_is_added_through_layers_that_run_together(tmp_path: Path) -> None:
    for model_type in ("falcon_h1", "gemma3n_text"):
        model, site = behind(tmp_path / model_type, model_type)
        batch = collate(ROWS)
        window = capture(model, site, batch).from_window()
        update = torch.zeros_like(window.hidden, requires_grad=True)
        upper_logits(model, site, window, window.with_update(update), batch.labelled).square().sum().backward()
        assert update.grad is not None
        assert update.grad.norm() > 0


def test_the_decoder_is_what_is_given_the_tokens(tmp_path: Path) -> None:
    assert behind(tmp_path / "opt", "opt")[1].decoder == "model.decoder"
    assert behind(tmp_path / "llama", "llama")[1].decoder is None


def test_a_base_is_known_by_the_tensors_of_the_layer(tmp_path: Path) -> None:
    _, site = behind(tmp_path, "qwen3_moe")
    checkpoint = Checkpoint(tmp_path)
    mark = fingerprint(tmp_path, checkpoint, site)
    require_base(tmp_path, checkpoint, site, mark)
    tensors = load_file(tmp_path / "model.safetensors")
    other = next(name for name in tensors if name.startswith("model.layers.3."))
    save_file({**tensors, other: tensors[other] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    assert site.digest(Checkpoint(tmp_path)) == mark.matrix
    own = next(name for name in tensors if name.startswith("model.layers.2."))
    save_file({**tensors, own: tensors[own] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongBaseError, match=r"its model\.layers\.2 differs"):
        require_base(tmp_path, Checkpoint(tmp_path), site, mark)


def test_a_layer_that_is_stored_under_another_path_is_found(tmp_path: Path) -> None:
    _, site = behind(tmp_path, "nemotron_h")
    checkpoint = Checkpoint(tmp_path)
    assert not any(name.startswith("model.layers.") for name in checkpoint)
    assert site.prefix_in(checkpoint) == "backbone.layers.2.wise_memory."
    assert site.mismatch(checkpoint) is None


def test_of_several_lists_of_layers_in_a_checkpoint_the_text_models_is_taken(tmp_path: Path) -> None:
    _, site = behind(tmp_path, "mllama")  # its layers that read images are as many, and as wide
    assert site.layer_module == "model.layers.2"
    assert site.prefix_in(Checkpoint(tmp_path)) == "language_model.model.layers.2.wise_memory."


def test_states_may_be_wider_than_the_config_says(tmp_path: Path) -> None:
    model, site = behind(tmp_path, "qwen4_exp_text")  # two streams, one behind the other
    assert site.d == 2 * model.config.hidden_size


def test_a_text_model_inside_another_is_found(tmp_path: Path) -> None:
    model, site = behind(tmp_path, "gemma3")
    assert site.layer_module == "model.language_model.layers.2"
    stored = [name for name in Checkpoint(tmp_path) if name.startswith(site.prefix_in(Checkpoint(tmp_path))[:-12])]
    inside = model.get_submodule(site.layer_module)
    assert len(stored) == len(list(inside.parameters()))


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2"])
def test_where_a_norm_stands_behind_the_matrix_a_lookup_goes_behind_the_layer(
    tmp_path: Path, architecture: str
) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path, architecture))
    assert find_layout(tmp_path, checkpoint, lookup=True).value is None
    assert find_layout(tmp_path, checkpoint).value == "mlp.down_proj"


def test_plain_models_are_edited_behind_a_layer_too_unless_a_matrix_is_wanted(tmp_path: Path) -> None:
    for model_type in ("llama", "phi"):
        place = save_type(tmp_path / model_type, model_type)
        checkpoint = Checkpoint(place)
        for lookup, kind in ((True, LayerSite), (False, MatrixSite)):
            layout = find_layout(place, checkpoint, lookup=lookup)
            layout = verified_layout(load_model(place, CPU).model, place, checkpoint, layout, 2)
            assert isinstance(find_site(place, checkpoint, 2, layout), kind)


def test_what_the_table_says_of_a_layer_is_what_a_probe_finds(tmp_path: Path) -> None:
    for architecture in TINY_CONFIGS:
        place = save_tiny(tmp_path / architecture, architecture)
        checkpoint, model = Checkpoint(place), load_model(place, CPU).model
        layout = find_layout(place, checkpoint, lookup=True)
        seen = verified_layout(model, place, checkpoint, replace(layout, known=False), 2)
        assert find_site(place, checkpoint, 2, layout) == find_site(place, checkpoint, 2, seen), architecture


def test_layers_can_be_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path))
    layout = find_layout(tmp_path, checkpoint, target_module="model.layers.{layer}", lookup=True)
    site = find_site(tmp_path, checkpoint, 2, layout)
    assert (site.module, site.width) == ("model.layers.2.wise_memory", site.d)
    with pytest.raises(SettingsError, match="names layers"):
        find_layout(tmp_path, checkpoint, target_module="model.layers.{layer}")


@pytest.mark.parametrize(
    ("model_type", "why"), [("qwen3_moe", "mixture of experts"), ("mixtral", "mixture of experts")]
)
def test_without_a_lookup_a_mixture_is_refused(tmp_path: Path, model_type: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"{why}.*keep edits as a lookup"):
        find_layout(tmp_path, Checkpoint(save_type(tmp_path, model_type)))


def unlike(model_type: str, change: Callable[[Any], None]) -> PreTrainedModel:
    """A tiny model with other settings."""
    model = tiny(model_type)
    change(model.config)
    return type(model)(model.config).eval()


def test_models_that_no_edit_can_be_put_into_are_refused_with_the_reason(tmp_path: Path) -> None:
    ahead = unlike("bert", lambda config: setattr(config, "is_decoder", False))
    site = LayerSite("bert", 2, "bert.encoder.layer.2", 32)
    with pytest.raises(ModelError, match=r"reads ahead.*is_decoder"):
        above_of(ahead, lambda above: replace(site, above=above))
    for model_type in ("rwkv", "xlstm"):
        with pytest.raises(ModelError, match="outside of a cache"):
            require_known_context(tiny(model_type))
    with pytest.raises(ModelError, match="adds tokens of its own"):
        require_known_context(tiny("xlm"))
    with pytest.raises(ModelError, match=r"runs 6 times a pass.*choose another layer with --layer"):
        behind(tmp_path / "hrm_text", "hrm_text")
    with pytest.raises(ModelError, match="no one width"):
        behind(tmp_path / "blt", "blt")
    with pytest.raises(ModelError, match="knows none of its tensors by name; edit another model"):
        behind(tmp_path / "emu3", "emu3")


def test_a_model_without_a_cache_can_be_told() -> None:
    require_known_context(tiny("openai-gpt"))
    assert decoder_of(tiny_model("gptj"), LayerSite("gptj", 2, "transformer.h.2", 32)) is None
