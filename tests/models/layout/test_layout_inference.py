import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from rich.console import Console as RichConsole
from safetensors.torch import load_file, save_file
from support.helpers import alone, hooked, random_rows, rewrite, save_tiny, tiny_tokenizer
from support.loading import CPU
from support.streamed import assert_edited_the_same_streamed
from support.thorough import few
from support.tiny_models import TINY_CONFIGS, VARIANTS, loader_of, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.cli import console
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.config import EditSettings
from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout import layout_inference, module_tree, site_probe
from wisecli.models.layout.architectures import Layout, architectures, known_layout
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.module_tree import value_paths
from wisecli.models.layout.site import find_site
from wisecli.models.layout.site_probe import check_split, observed_layout
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import capture
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import NOTE, Event

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Architectures without a row, the settings that make them tiny, and where their value matrix is.
OTHERS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "gemma": (
        {"intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2},
        "model.layers.{layer}.mlp.down_proj",
        None,
    ),
    "glm4": ({"intermediate_size": 64, "head_dim": 8}, "model.layers.{layer}.mlp.down_proj", "post_mlp_layernorm"),
    "starcoder2": ({"intermediate_size": 64, "num_key_value_heads": 2}, "model.layers.{layer}.mlp.c_proj", None),
    "phi": ({"intermediate_size": 64, "num_key_value_heads": 2}, "model.layers.{layer}.mlp.fc2", None),
    "bloom": ({"n_layer": 4, "n_head": 4}, "transformer.h.{layer}.mlp.dense_4h_to_h", None),
}
# Models that are not around a text model: only of these the tree is asked.
PLAIN = [name for name in sorted(TINY_CONFIGS | VARIANTS) if loader_of(name) is AutoModelForCausalLM]
EDITS = [{"id": "one", "prompt": "ba be bi", "target": "do du"}, {"id": "two", "prompt": "ka ke", "target": "fa"}]
ROWS = random_rows((1, 2), (4, 1), (9, 3))
DOWN = "model.layers.{layer}.mlp.down_proj"


def other_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **OTHERS[model_type][0]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def save_other(directory: Path, model_type: str) -> Path:
    model = other_model(model_type)
    if (norm := OTHERS[model_type][2]) is not None:  # as drawn it lets no change weigh
        for name, parameter in model.named_parameters():
            if name.endswith(f"{norm}.weight"):
                parameter.data.add_(12)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def layout_of(directory: Path, **named: Any) -> Layout:
    return find_layout(directory, Checkpoint(directory), **named)


def path_of(layout: Layout) -> str:
    return f"{layout.layers}.{{layer}}.{layout.value}"


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, EDITS)))
    return path


@pytest.mark.parametrize("variant", PLAIN)
def test_what_the_module_tree_shows_is_what_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    row = known_layout(tmp_path)
    assert layout_of(tmp_path) == row
    monkeypatch.setattr(layout_inference, "architectures", dict)
    layout = layout_of(tmp_path)
    assert (layout.layers, layout.value, layout.transposed) == (row.layers, row.value, row.transposed)
    assert not layout.known
    seen = observed_layout(model, find_site(tmp_path, Checkpoint(tmp_path), 2, layout), layout)
    assert seen.norm == row.norm
    assert seen.multiplier == pytest.approx(row.multiplier, rel=1e-4)
    check_split(model, find_site(tmp_path, Checkpoint(tmp_path), 2, seen))


@pytest.mark.parametrize("model_type", OTHERS)
def test_an_update_of_an_architecture_without_a_row_does_what_it_does_in_the_whole_model(
    tmp_path: Path, model_type: str
) -> None:
    save_other(tmp_path, model_type)
    told: list[Event] = []
    layout = layout_of(tmp_path, on_progress=told.append)
    _, path, norm = OTHERS[model_type]
    assert path_of(layout) == path
    assert [event.stage for event in told] == [NOTE]
    assert all(word in told[0].note for word in (repr(model_type), path, "--set target_module"))
    model = other_model(model_type)
    layout = observed_layout(model, find_site(tmp_path, Checkpoint(tmp_path), 2, layout), layout)
    assert (layout.norm, layout.multiplier) == (norm, 1.0)
    site = find_site(tmp_path, Checkpoint(tmp_path), 2, layout)
    check_split(model, site)
    delta = torch.randn(site.d, site.d_ff, generator=torch.Generator().manual_seed(5)) / site.d_ff**0.5
    with hooked(model, site, lambda _module, inputs, output: output + inputs[0] @ delta.T):
        expected = torch.cat([alone(model, row) for row in ROWS])
    batch = collate(ROWS)
    activations = capture(model, site, batch)
    with torch.no_grad():
        update = activations.with_update(activations.keys @ delta.T)
        changed = upper_logits(model, site, activations, update, batch.labelled)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-4)


def test_an_architecture_without_a_row_goes_the_whole_way(
    tmp_path: Path, edits: Path, capsys: pytest.CaptureFixture[str], run: Callable[..., int]
) -> None:
    base, shards, memory, edited = (tmp_path / name for name in ("base", "shards", "memory", "edited"))
    save_other(base, "glm4")
    assert run("edit", str(base), str(edits), "-o", str(tmp_path / "m"), "--device", "cpu", "--set", "site=matrix") == 0
    said = capsys.readouterr().err
    assert "model.layers.{layer}.mlp.down_proj" in said
    assert "--set target_module" in said
    assert read_shard_directory(tmp_path / "m").site.norm == "model.layers.2.post_mlp_layernorm"
    assert run("edit", str(base), str(edits), "-o", str(shards), "--device", "cpu") == 0
    assert "--set target_module" not in capsys.readouterr().err
    site = read_shard_directory(shards).site
    assert (site.base_name, site.norm) == ("model.layers.2", None)
    assert run("merge", str(shards), "-o", str(memory)) == 0
    assert run("export", "--memory", str(memory), "-o", str(edited)) == 0
    assert run("generate", str(edited), "ba be bi") == 0


def test_the_target_module_option_is_taken_where_the_tree_is_not_asked(
    tmp_path: Path, edits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "base")
    monkeypatch.setattr(layout_inference, "architectures", dict)
    monkeypatch.setattr(module_tree, "value_paths", None)
    report = run_edit(
        str(tmp_path / "base"),
        edits,
        tmp_path / "shards",
        EditSettings(layer="1", unrelated_texts=16, residual_stop=0.2),
        load=CPU,
        target_module=DOWN,
    )
    assert report.module == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("architecture", "turned"), [("llama", False), ("gpt2", True)])
def test_which_way_a_told_matrix_is_stored_shows_in_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, turned: bool
) -> None:
    save_tiny(tmp_path, architecture)
    path = path_of(known_layout(tmp_path))
    assert layout_of(tmp_path, target_module=path) == known_layout(tmp_path)
    monkeypatch.setattr(layout_inference, "architectures", dict)
    layout = layout_of(tmp_path, target_module=path)
    assert (path_of(layout), layout.transposed, layout.known) == (path, turned, False)
    assert find_site(tmp_path, Checkpoint(tmp_path), 2, layout).d == 32


def test_another_matrix_than_the_tables_may_be_told(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    layout = layout_of(tmp_path, target_module="model.layers.{layer}.self_attn.o_proj")
    assert (layout.value, layout.known) == ("self_attn.o_proj", False)


@pytest.mark.parametrize(
    "told", ["model.layers.2.mlp.down_proj", "{layer}", "model.{layer}.x.{layer}.y", "model.layers.{layer}", ""]
)
def test_a_told_path_without_a_place_for_the_index_is_refused(tmp_path: Path, told: str) -> None:
    save_tiny(tmp_path)
    with pytest.raises(SettingsError, match="--set target_module"):
        layout_of(tmp_path, target_module=told)


def test_a_told_matrix_that_is_not_there_is_refused(tmp_path: Path, edits: Path) -> None:
    save_tiny(tmp_path / "base")
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.nothing"):
        run_edit(
            str(tmp_path / "base"),
            edits,
            tmp_path / "shards",
            EditSettings(),
            target_module="model.layers.{layer}.mlp.nothing",
        )


@pytest.mark.parametrize("told", ["up_proj", "gate_proj"])
def test_a_told_matrix_whose_output_does_not_join_the_stream_is_refused(tmp_path: Path, told: str) -> None:
    save_tiny(tmp_path)
    layout = layout_of(tmp_path, target_module=f"model.layers.{{layer}}.mlp.{told}")
    site = find_site(tmp_path, Checkpoint(tmp_path), 2, layout)
    with pytest.raises(ModelError, match="does not join the residual stream"):
        observed_layout(tiny_model("llama"), site, layout)


def test_a_matrix_that_sees_all_rows_as_one_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("opt", **SHAPE, ffn_dim=64, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    layout = layout_of(tmp_path)
    assert path_of(layout) == "model.decoder.layers.{layer}.fc2"
    with pytest.raises(ModelError, match="does not join the residual stream"):
        observed_layout(model, find_site(tmp_path, Checkpoint(tmp_path), 2, layout), layout)


class Layer(nn.Module):
    """A layer in which two matrices may be the value matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(64, 32)
        self.up, self.square = nn.Linear(32, 64), nn.Linear(32, 32)


def test_a_tree_that_leaves_a_choice_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(Layer() for _ in range(5))
    assert value_paths(model, 5) == {"model.layers.{layer}.first": False, "model.layers.{layer}.second": False}
    assert value_paths(model, 4) == {}
    save_tiny(tmp_path)
    down, attention = DOWN, "model.layers.{layer}.self_attn.o_proj"
    monkeypatch.setattr(layout_inference, "architectures", dict)
    monkeypatch.setattr(
        module_tree, "value_paths", lambda *_: {down: False, attention: False, "elsewhere.{layer}.x": False}
    )
    with pytest.raises(UnknownArchitectureError) as caught:
        layout_of(tmp_path)
    assert all(word in str(caught.value) for word in (down, attention, "--set target_module"))
    assert "elsewhere" not in str(caught.value)


def test_attention_as_wide_as_no_feed_forward_layer_is_not_taken_for_one() -> None:
    model = tiny_model("gemma2")  # heads of 8 times 4 are as wide as the stream; wider ones are not
    model.model.layers[0].self_attn.o_proj = nn.Linear(48, 32)
    assert value_paths(model, 5) == {DOWN: False}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 8},
        {"num_local_experts": 2},
        {"n_routed_experts": 64},
        {"text_config": {"num_experts": 8}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
    ids=str,
)
def test_where_a_matrix_is_needed_experts_and_quantised_models_are_refused_in_one_sentence(
    tmp_path: Path,
    edits: Path,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., int],
    settings: dict[str, Any],
    known: bool,
) -> None:
    base = save_tiny(tmp_path / "base")
    rewrite(base / "config.json", **settings, **({} if known else {"model_type": "unheard_of"}))
    capsys.readouterr()
    assert run("edit", str(base), str(edits), "-o", str(tmp_path / "shards"), "--preset", "paper") == 2
    said = capsys.readouterr().err
    quantised = "quantization" in str(settings)
    assert "quantised" in said if quantised else "mixture of experts" in said
    assert "edit the model it was quantised from" in said if quantised else "choose a dense model" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "shards").exists()


def test_experts_show_in_the_names_of_tensors_too(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="mixture of experts"):
        layout_of(tmp_path)


@pytest.mark.parametrize("settings", [{"num_experts": 1}, {"num_local_experts": 0}, {"quantization_config": None}])
def test_a_dense_model_that_only_mentions_them_is_none_of_these(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_tiny(tmp_path)
    rewrite(tmp_path / "config.json", **settings)
    assert layout_of(tmp_path).known


def test_an_export_is_no_base_to_edit(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    rewrite(tmp_path / "config.json", model_type="wise_llama", wise={})
    with pytest.raises(UnknownArchitectureError, match="edit the base model"):
        layout_of(tmp_path)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    layout = layout_of(tmp_path)
    with pytest.raises(ModelError, match="cannot be run alone"):
        check_split(model, find_site(tmp_path, Checkpoint(tmp_path), 1, layout))


@pytest.mark.parametrize("spoil", [lambda hidden: hidden + 1, lambda hidden: -hidden])
def test_a_suffix_that_answers_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    save_tiny(tmp_path)
    model, site = tiny_model("llama"), find_site(tmp_path, Checkpoint(tmp_path), 2)
    check_split(model, site)
    monkeypatch.setattr(site_probe, "upper_logits", lambda m, s, a, h, select: upper_logits(m, s, a, spoil(h), select))
    with pytest.raises(ModelError, match="do not give the model's answers"):
        check_split(model, site)


def test_the_page_of_help_names_the_option() -> None:
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert "`target_module`" in page.read_text()
    assert set(architectures()) >= {"llama", "gemma2", "falcon"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_is_a_sentence_on_stderr_wherever_it_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(rich.console, "Console", lambda **named: RichConsole(**named, force_terminal=terminal))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with console.Console().watching() as watch:
        watch(Event("model"))
        watch(Event(NOTE, note="this [one] was taken"))
    captured = capsys.readouterr()
    assert captured.err.count("this [one] was taken") == 1
    assert captured.out == ""


@pytest.mark.parametrize("model_type", few(sorted(OTHERS), ("bloom",)))
def test_an_unknown_architecture_is_edited_the_same_when_its_layers_are_streamed(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_other(tmp_path / "base", model_type)
    settings = EditSettings(passes=2, unrelated_texts=16, layer="2", residual_stop=0.2)
    assert_edited_the_same_streamed(tmp_path, base, EDITS, settings, monkeypatch)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("distilbert", "generate no text in transformers; edit a decoder"),
        ("t5", "an encoder-decoder model, or half of one; edit"),
        ("unheard_of", r"transformers cannot build a model of type 'unheard_of' \(.*unheard_of.*\); install"),
    ],
)
def test_what_transformers_has_no_decoder_for_is_refused_with_the_reason(
    tmp_path: Path, model_type: str, reason: str
) -> None:
    base = save_tiny(tmp_path)
    settings = {"is_encoder_decoder": True} if model_type == "t5" else {}
    rewrite(base / "config.json", model_type=model_type, **settings)
    with pytest.raises(ModelError, match=reason):
        find_layout(base, Checkpoint(base), lookup=True)
