import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import WORDS, save_tiny
from support.loading import CPU
from support.places import EDITS, copied
from support.routers import certain_router
from support.sharing import Share
from support.tiny_models import TINY_CONFIGS
from transformers import AutoModelForCausalLM

from wisecli.artifacts.checksums import write_checksums
from wisecli.artifacts.file_names import MEMORY_TENSORS
from wisecli.artifacts.memory_manifest import read_memory
from wisecli.commands.checkpoint import export_stock
from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.checkpoint.export_source import ExportSource
from wisecli.commands.checkpoint.generate import generate
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.measure.check import edits_in
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.errors import ModelError, SettingsError
from wisecli.export.stock.router.router_blocks import Router
from wisecli.export.stock.router.router_fitting import fitted_router
from wisecli.export.stock.stock_answers import router_lines
from wisecli.export.stock.stock_manifest import read_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import LayerSite


def make_stock(root: Path, target_module: str | None = None) -> None:
    """A tiny model, a memory of it, and that as a stock checkpoint."""
    base = save_tiny(root / "model")
    (root / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    quick = EditSettings(passes=2, unrelated_texts=16, residual_stop=0.2)
    run_edit(str(base), root / "edits.jsonl", root / "shards", quick, load=CPU, target_module=target_module)
    merge([root / "shards"], root / "memory", MergeSettings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_stock, "fitted_router", certain_router)
        export(root / "memory", root / "stock", "stock", load=CPU)


@pytest.fixture(scope="module")
def root(share: Share) -> Path:
    return share("stock", make_stock)


def test_edits_behind_a_layer_are_answered_without_code_of_its_own(tmp_path: Path) -> None:
    make_stock(tmp_path, "model.layers.{layer}")
    told = json.loads((tmp_path / "stock" / "wise.json").read_text())
    assert isinstance(read_stock(tmp_path / "stock").site, LayerSite)
    assert told["gate"]["stock"]["as_taught"] == 1.0
    assert not list((tmp_path / "stock").glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {check.state for check in verify(tmp_path / "stock", model=str(tmp_path / "model")).checks} == {"same"}


def test_edits_are_answered_without_code_of_its_own(root: Path) -> None:
    told = json.loads((root / "stock" / "wise.json").read_text())
    assert told["format"] == "stock"
    assert told["gate"]["stock"]["as_taught"] == 1.0
    assert [edit["prompt"] for edit in told["edits"]] == [edit["prompt"] for edit in EDITS]
    assert not list((root / "stock").glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(root / "stock")
    assert type(model).__name__ == "LlamaForCausalLM"
    answers = generate(root / "stock", [edit["prompt"] for edit in EDITS], load=CPU, max_new_tokens=4)
    assert [answer.text for answer in answers] == [edit["target"] for edit in EDITS]


def test_edits_in_several_blocks_are_answered_and_all_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_stock, "fitted_router", certain_router)
    chance = random.Random(0)
    edits = [
        {"prompt": " ".join(chance.sample(WORDS, 4)), "target": " ".join(chance.sample(WORDS, 2))} for _ in range(24)
    ]
    config = copy.deepcopy(TINY_CONFIGS["llama"])  # of states wide enough to tell so many keys apart
    config.hidden_size, config.head_dim = 128, 32
    base = save_tiny(tmp_path / "model", config=config)
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    quick = EditSettings(passes=10, unrelated_texts=64)
    run_edit(str(base), tmp_path / "edits.jsonl", tmp_path / "shards", quick, load=CPU)
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings())
    gate = export(tmp_path / "memory", tmp_path / "stock", "stock", load=CPU).gate
    assert gate is not None
    assert gate["blocks"] > 4
    assert gate["stock"]["as_taught"] == 1.0
    assert gate["stock"]["unrelated"] > 0.95


def test_every_edit_is_asked_and_what_is_lost_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = json.loads((root / "stock" / "wise.json").read_text())["gate"]
    assert gate["lost"] == []
    assert gate["edits"] == len(EDITS)
    assert 0.0 <= gate["stock"]["unchanged"] <= gate["routed"]["unchanged"] == 1.0
    monkeypatch.setattr(export_stock, "fitted_router", shut)
    gate = export(root / "memory", root / "shut", "stock", load=CPU).gate
    assert gate is not None
    assert [edit["id"] for edit in gate["lost"]] == [edit["id"] for edit in EDITS]
    assert gate["stock"]["unchanged"] == gate["stock"]["unrelated"] == 1.0
    assert any(EDITS[0]["prompt"] in line and "--format routed" in line for line in router_lines(gate))


def shut(*about: Any, **named: Any) -> Router:
    """A router that never opens."""
    router = fitted_router(*about, **named)
    return replace(router, thresholds=torch.full_like(router.thresholds, 1e3))


def test_nobody_is_asked_without_verifying(root: Path) -> None:
    report = export(root / "memory", root / "hurried", "stock", load=CPU, verify=False)
    assert report.gate == {"keys": inspect(root / "stock").keys, "blocks": 4, "last": 1}
    assert "not verified" in router_lines(report.gate)[1]
    assert export(root / "memory", root / "hurried", "stock", load=CPU, verify=False).up_to_date
    assert {check.state for check in verify(root / "hurried", model=str(root / "model")).checks} == {"same"}


def test_it_is_whole_and_the_base_model_is_around_it(root: Path) -> None:
    report = verify(root / "stock", model=str(root / "model"))
    assert {check.state for check in report.checks} == {"same"}
    assert "all tensors of the base model" in {check.what for check in report.checks}


@pytest.mark.parametrize(("edited", "read"), [(4, 2), (3, 2), (1, 1)])
def test_a_router_stands_at_two_fifths_of_the_depth_or_where_edits_do(root: Path, edited: int, read: int) -> None:
    manifest = read_memory(root / "memory")
    base = root / "model"
    edits = replace(manifest, site=manifest.site.below(edited))
    given = ExportSource(base, Checkpoint(base), edits, Packing(), None, CPU, verify=False)
    assert export_stock._at_router(given).site == manifest.site.below(read)
    assert read_stock(root / "stock").site == manifest.site.below(2)


@pytest.mark.parametrize("part", ["self_attn.o_proj.weight", "mlp.up_proj.bias"])
@pytest.mark.parametrize("damage", ["other numbers", "no numbers", "another shape", "gone"])
def test_altered_blocks_are_found_out(root: Path, tmp_path: Path, part: str, damage: str) -> None:
    place = copied(root, "stock", tmp_path)
    tensors = load_file(place / MEMORY_TENSORS)
    name = f"model.layers.{read_stock(place).site.layer + 1}.{part}"
    if damage == "gone":
        del tensors[name]
    elif damage == "another shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name] = torch.full_like(tensors[name], 1.0 if damage == "other numbers" else torch.nan)
    save_file(tensors, place / MEMORY_TENSORS, {"format": "pt"})
    if damage == "other numbers":
        assert [check.file for check in verify(place).differences] == [MEMORY_TENSORS]
    else:
        write_checksums(place)
        assert name in {check.tensor for check in verify(place).differences}


def test_another_base_model_is_found_out(root: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    assert verify(root / "stock", model=str(other)).differences


def test_inspect_says_what_it_holds(root: Path) -> None:
    report = inspect(root / "stock", find="fa")
    assert (report.kind, report.total, report.matched) == ("stock", 3, 1)
    assert report.keys == json.loads((root / "stock" / "wise.json").read_text())["gate"]["keys"]
    assert report.routing["blocks"] == 4
    # Matrices and norms of four layers, and their biases.
    assert len(report.tensors[MEMORY_TENSORS]) == 4 * (7 + 2 + 7)


def test_its_edits_are_what_a_server_is_checked_with(root: Path) -> None:
    assert [edit.id for edit in edits_in(root / "stock")] == [edit["id"] for edit in EDITS]
    assert [edit.id for edit in edits_in(root / "memory")] == [edit["id"] for edit in EDITS]


def test_what_there_is_no_router_for_is_refused(root: Path) -> None:
    with pytest.raises(SettingsError, match="--explain"):
        generate(root / "stock", ["ba"], explain=True, load=CPU)
    with pytest.raises(SettingsError, match="--plot"):
        inspect(root / "stock", plot=root / "plot.png")


def test_a_second_export_finds_the_first(root: Path) -> None:
    report = export(root / "memory", root / "stock", "stock", load=CPU)
    assert report.up_to_date
    assert report.gate == json.loads((root / "stock" / "wise.json").read_text())["export"]["gate"]


def test_links_and_tokenizers_without_bytes_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--link"):
        export(root / "memory", tmp_path / "out", "stock", weights=WeightFiles(link=True), load=CPU)
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match="no byte-level BPE"):
        export(root / "memory", tmp_path / "out", "gguf", load=CPU)
    assert not (tmp_path / "out").exists()
