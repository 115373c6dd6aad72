from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import save_type
from support.helpers import random_rows, save_tiny, site_of
from support.places import make_places

from wisecli.commands.edit.edit import edit
from wisecli.config import EditSettings, LoadOptions
from wisecli.editing.examples.token_check import USUAL_LENGTH
from wisecli.editing.run.resource_estimate import Plan, plan_edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import captured
from wisecli.models.streaming.layer_stream import LayerStream
from wisecli.models.streaming.memory_budget import LIBRARIES, expert_rooms, in_hand, sizes, spool_bytes

SETTINGS = EditSettings(unrelated_texts=16, layer="2")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_sizes_are_those_of_the_loaded_model(tmp_path: Path, variant: str, dtype: str) -> None:
    directory = save_tiny(tmp_path / "model", variant)
    model = load_model(directory, load=LoadOptions(device="cpu", dtype=dtype)).model
    layers = known_layout(directory).layers
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    found = sizes(Checkpoint(directory), layers, wanted)
    each = [sum(p.nbytes for p in layer.parameters()) for layer in model.get_submodule(layers).children()]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert found.layers == tuple(each)
    assert (found.weights, found.resident) == (whole, whole - sum(each))
    assert found.item == model.dtype.itemsize


def test_a_model_that_fits_needs_no_spool(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model"))
    weights = sizes(checkpoint, "model.layers").weights
    assert spool_bytes(checkpoint, "auto", 2 * weights) is None
    assert spool_bytes(checkpoint, "auto", weights) == round(weights / 8)
    assert spool_bytes(checkpoint, torch.bfloat16, weights) is None


def test_a_sweep_reads_what_is_planned(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    checkpoint = Checkpoint(directory)
    plan = plan_edit(checkpoint, find_site(directory, checkpoint, 2), SETTINGS, [USUAL_LENGTH] * 10, memory_budget=1)
    loaded = load_model(directory, load=LoadOptions(device="cpu", memory_budget=1))
    assert loaded.stream is not None
    site, batch = site_of(loaded.model, 2), collate(random_rows((3, 1)))
    before = loaded.stream.bytes_read
    list(captured(loaded.model, site, [batch], stream=loaded.stream, above=False))
    assert loaded.stream.bytes_read - before == plan.sweep
    assert plan.layer == loaded.stream.layer_bytes
    loaded.stream.hold(range(3, 5))
    assert loaded.stream.bytes_read - before - plan.sweep == plan.held


def test_an_edit_reads_about_what_is_planned(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = make_places(tmp_path)
    streams: list[LayerStream] = []
    made = LayerStream.__init__

    def noted(self: LayerStream, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        streams.append(self)

    monkeypatch.setattr(LayerStream, "__init__", noted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    base, checkpoint = places / "model", Checkpoint(places / "model")
    edit(
        str(base),
        places / "edits.jsonl",
        tmp_path / "out",
        SETTINGS,
        load=LoadOptions(device="cpu", memory_budget=1000),
    )
    plan = plan_edit(checkpoint, find_site(base, checkpoint, 2), SETTINGS, [USUAL_LENGTH] * 3, memory_budget=1000)
    assert 0.7 < plan.read / streams[0].bytes_read < 1.4


def test_what_is_held_whole_reads_nothing_and_takes_its_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    checkpoint = Checkpoint(directory)
    site = find_site(directory, checkpoint, 2)
    for budget in (None, 10**9):
        plan = plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, memory_budget=budget)
        assert not plan.streamed
        assert (plan.resident, plan.held, plan.spooled, plan.sweep, plan.read) == (plan.weights, 0, 0, 0, 0)
        assert plan.peak > plan.weights
    assert plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, memory_budget=1000).streamed


def test_more_to_do_takes_no_less(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    checkpoint = Checkpoint(directory)
    site = find_site(directory, checkpoint, 2)
    few, edits, texts = (
        plan_edit(checkpoint, site, EditSettings(unrelated_texts=count), [USUAL_LENGTH] * edits, memory_budget=1000)
        for edits, count in ((10, 100), (400, 100), (10, 5000))
    )
    for name in ("peak", "spooled", "read", "flops"):
        assert getattr(edits, name) >= getattr(few, name)
        assert getattr(texts, name) >= getattr(few, name)
    assert edits.flops > few.flops
    assert texts.flops > few.flops


def test_experts_of_a_layer_are_counted_as_those_that_are_there(tmp_path: Path) -> None:
    directory = save_type(tmp_path / "model", "deepseek_v3")
    checkpoint = Checkpoint(directory)
    layout = find_layout(directory, checkpoint, lookup=True)
    loaded = load_model(directory, LoadOptions(device="cpu", memory_budget=1), layers=layout.layers)
    assert loaded.stream is not None
    found = sizes(checkpoint, layout.layers, "auto", layout.experts)
    each = [sum(one.bytes for one in own.values()) for own in loaded.stream._experts]
    assert found.experts == tuple(each)
    assert found.expert == max(sum(one.bytes // 4 for one in own.values()) for own in loaded.stream._experts)
    buffers = [sum(one.nbytes for one in layer.buffers()) for layer in loaded.stream.layers]
    dense = [sum(part.bytes for part in stored) for stored in loaded.stream._stored]
    assert found.dense == tuple(own + more for own, more in zip(dense, buffers, strict=True))
    site = find_site(directory, checkpoint, 2, layout)
    given: dict[str, Any] = {"memory_budget": 1, "experts": layout.experts}
    plan = plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, **given)
    whole = plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, memory_budget=1)
    assert plan.held == sum(found.dense[3:]) < whole.held
    assert plan.layer == max(found.dense) + in_hand(found.expert)
    assert plan.read > whole.read
    given["memory_budget"] = 3 << 30
    assert not plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, **given).streamed


def test_room_for_experts_is_what_the_stream_takes(tmp_path: Path) -> None:
    directory = save_type(tmp_path / "model", "qwen3_moe")
    checkpoint = Checkpoint(directory)
    layout = find_layout(directory, checkpoint, lookup=True)
    loaded = load_model(directory, LoadOptions(device="cpu", memory_budget=1), layers=layout.layers)
    stream, found = loaded.stream, sizes(checkpoint, layout.layers, "auto", layout.experts)
    assert stream is not None
    stream.budget = LIBRARIES + found.weights
    stream.hold(range(3, 5))
    weights = found.resident + sum(found.dense[3:]) + 2 * max(found.dense) + in_hand(found.expert)
    expected = expert_rooms(stream.budget, weights, max(found.experts))
    for own, planned in zip((stream._passing.size, stream._staying.size), expected, strict=True):
        assert planned > 0
        assert abs(own - planned) < 200  # what lines of 64 bytes leave empty
    assert sum(expected) < stream.budget - LIBRARIES - weights


def test_the_least_budget_that_does_is_said_where_one_does_not(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    checkpoint = Checkpoint(directory)
    site = find_site(directory, checkpoint, 2)

    def planned(budget: int) -> Plan:
        return plan_edit(checkpoint, site, SETTINGS, [USUAL_LENGTH] * 10, memory_budget=budget)

    least = planned(1).least
    assert least is not None
    assert f"({least / 2**30:.2f}GiB is the least that does)" in planned(1).remedy
    assert (planned(least).fits, planned(least).least) == (True, None)
    assert not planned(least - (1 << 30) // 100).fits
