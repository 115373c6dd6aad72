from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wisecli.edits import Edit, Probe
from wisecli.errors import DamagedFileError
from wisecli.memory import UNROUTED, RoutedMatrix, SideMemory
from wisecli.router import (
    MANIFEST_NAME,
    MEMORY_NAME,
    Manifest,
    calibrate,
    key_router,
    quantile,
    read_memory,
    scores,
    whitening,
    write_memory,
)
from wisecli.shards import describe_unrelated
from wisecli.site import Fingerprint, Site

SHRINKAGE = 0.1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unrelated_keys(count: int, d_ff: int) -> Tensor:
    turn = torch.linalg.qr(torch.randn(d_ff, d_ff, generator=generator()))[0]
    spread = torch.diag(torch.linspace(0.1, 4.0, d_ff)) @ turn
    return torch.randn(count, d_ff, generator=generator(1)) @ spread + 0.5


# --- quantiles and thresholds ---


@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=60),
    share=st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.999, 1.0]),
)
def test_a_quantile_is_numpys(values: list[float], share: float) -> None:
    expected = float(np.quantile(np.array(values, dtype=np.float64), share))
    assert quantile(torch.tensor(values), share) == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.999, 1.0])
def test_a_quantile_of_a_table_is_that_of_all_its_entries(share: float) -> None:
    values = torch.randn(30, 4, 5, generator=generator())
    expected = float(np.quantile(values.numpy(), share))
    assert quantile(values, share) == pytest.approx(expected, abs=1e-6)
    assert quantile(values.half(), share) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("false_alarm", [0.0, 0.001, 0.02, 0.5])
def test_false_alarms_are_let_through_in_the_share_asked_for(false_alarm: float) -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)) + 0.3, torch.rand(1000, generator=generator(3))
    found = calibrate(edits, unrelated, rule="false-alarm", false_alarm=false_alarm)
    assert found.rule == "false-alarm"
    assert found.threshold == pytest.approx(float(np.quantile(unrelated.numpy(), 1 - false_alarm)), abs=1e-6)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)
    assert abs(found.false_alarms - false_alarm) <= 1 / len(unrelated)
    assert found.misses == pytest.approx(np.mean(edits.numpy() <= found.threshold), abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-3, 1e3))
def test_the_minimum_rule_routes_every_edit_and_lies_just_below_the_lowest(seed: int, size: float) -> None:
    edits = (torch.rand(20, generator=generator(seed)) + 0.01) * size
    unrelated = torch.rand(50, generator=generator(seed + 1)) * size
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.3)
    lowest = float(edits.min())
    assert found.threshold < lowest
    assert found.threshold == pytest.approx(lowest, rel=1e-5)
    assert (found.rule, found.misses) == ("minimum", 0.0)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)


def test_a_calibration_tells_the_quantiles_of_both_sides() -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)), torch.rand(1000, generator=generator(3))
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.001)
    for summary, values in ((found.edit_scores, edits), (found.unrelated_scores, unrelated)):
        assert {"0", "0.5", "0.999", "1"} <= set(summary)
        for share, value in summary.items():
            assert value == pytest.approx(float(np.quantile(values.numpy(), float(share))), abs=2e-6)


@pytest.mark.parametrize("rule", ["false-alarm", "minimum"])
@pytest.mark.parametrize("lowest", [0.2, 0.0, -1.0], ids=["above nought", "from nought", "cosines around nought"])
@pytest.mark.parametrize("false_alarm", [0.001, 0.5])
def test_the_router_does_what_its_calibration_says(rule: str, lowest: float, false_alarm: float) -> None:
    edits, unrelated = (lowest + (0.8 - lowest) * torch.rand(101, generator=generator(seed)) for seed in (4, 5))
    found = calibrate(edits, unrelated, rule=rule, false_alarm=false_alarm)
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory({}, (found.threshold,), "key"), transposed=False)
    missed, alarmed = (float((routed.choose(side[:, None]) == UNROUTED).float().mean()) for side in (edits, unrelated))
    assert missed == pytest.approx(found.misses, abs=1e-6)
    assert 1 - alarmed == pytest.approx(found.false_alarms, abs=1e-6)


# --- whitening ---


@pytest.mark.parametrize("d_ff", [3, 16, 40])
def test_full_whitening_is_the_inverse_of_the_shrunk_second_moments(d_ff: int) -> None:
    keys = unrelated_keys(300, d_ff)
    unrelated = describe_unrelated(keys, torch.ones(300, dtype=torch.bool), sample=1, rank=d_ff)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), d_ff)
    found = white.apply(torch.eye(d_ff)).double()
    moments = keys.double().T @ keys.double() / len(keys)
    expected = torch.linalg.inv(moments + SHRINKAGE * moments.trace() / d_ff * torch.eye(d_ff))
    assert torch.allclose(found / found.trace(), expected / expected.trace(), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_what_a_lower_rank_leaves_is_taken_as_even(rank: int) -> None:
    keys, d_ff = unrelated_keys(300, 20), 20
    unrelated = describe_unrelated(keys, torch.ones(300, dtype=torch.bool), sample=1, rank=rank)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), d_ff)
    found = white.apply(torch.eye(d_ff)).double()
    values, vectors = torch.linalg.eigh(keys.double().T @ keys.double() / len(keys))
    even = values.clone()
    even[: d_ff - rank] = values[: d_ff - rank].mean()
    expected = vectors @ torch.diag(1 / (even + SHRINKAGE * values.mean())) @ vectors.T
    assert torch.allclose(found / found.trace(), expected / expected.trace(), atol=1e-5)


def test_fewer_texts_than_coordinates_whiten_too() -> None:
    keys, d_ff = unrelated_keys(12, 30), 30
    unrelated = describe_unrelated(keys, torch.ones(12, dtype=torch.bool), sample=1, rank=100)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), d_ff)
    found = white.apply(torch.eye(d_ff)).double()
    moments = keys.double().T @ keys.double() / len(keys)
    expected = torch.linalg.inv(moments + SHRINKAGE * moments.trace() / d_ff * torch.eye(d_ff))
    assert torch.allclose(found / found.trace(), expected / expected.trace(), atol=1e-4)


def test_even_text_is_left_as_it_is() -> None:
    white = whitening(torch.full((4,), 2.0), torch.eye(6)[:4], 12.0, 6)
    found = white.apply(torch.eye(6))
    assert torch.allclose(found, float(found[0, 0]) * torch.eye(6), atol=1e-6)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_whitening_is_applied_along_the_last_axis(leading: tuple[int, ...]) -> None:
    unrelated = describe_unrelated(unrelated_keys(50, 8), torch.ones(50, dtype=torch.bool), sample=1, rank=5)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), 8)
    matrix = white.floor * torch.eye(8) + white.directions.T @ torch.diag(white.gains) @ white.directions
    keys = torch.randn(*leading, 8, generator=generator(6))
    assert torch.allclose(white.apply(keys), keys @ matrix, atol=1e-5)


@pytest.mark.parametrize("rank", [16, 6])
@pytest.mark.parametrize("memories", [1, 3])
def test_key_scores_are_plain_cosines_of_whitened_keys(rank: int, memories: int) -> None:
    d_ff, count = 16, 9
    unrelated = describe_unrelated(unrelated_keys(200, d_ff), torch.ones(200, dtype=torch.bool), sample=1, rank=rank)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), d_ff)
    edits, asked = (torch.randn(number, d_ff, generator=generator(number)) for number in (count, 25))
    owner = torch.arange(count) % memories
    tensors = key_router(edits, owner, white)
    memory = SideMemory(tensors, (1.0,) * memories, "key", floor=white.floor)
    found = scores(RoutedMatrix(nn.Linear(1, 1), memory, transposed=False), asked)

    values, vectors = torch.linalg.eigh(white.apply(torch.eye(d_ff)).double())
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    for row, key in enumerate(asked.double()):
        for number in range(memories):
            cosines = [
                float(torch.nn.functional.cosine_similarity(root @ key, root @ edit, dim=0))
                for edit, owned in zip(edits.double(), owner.tolist(), strict=True)
                if owned == number
            ]
            assert float(found[row, number]) == pytest.approx(max(cosines), abs=1e-5)


def test_an_edits_own_key_scores_one() -> None:
    unrelated = describe_unrelated(unrelated_keys(200, 16), torch.ones(200, dtype=torch.bool), sample=1, rank=16)
    white = whitening(unrelated.variances, unrelated.directions, float(unrelated.energy), 16)
    edits = torch.randn(5, 16, generator=generator(7))
    tensors = key_router(edits, torch.zeros(5, dtype=torch.long), white)
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory(tensors, (1.0,), "key", floor=white.floor), transposed=False)
    for size in (1.0, 0.01, 300.0):
        assert torch.allclose(routed.scores(size * edits), torch.ones(5, 1), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 7, 4096])
def test_scores_of_many_keys_do_not_depend_on_how_they_are_cut(batch: int) -> None:
    tensors = {"columns": torch.tensor([[0, 2]]), "delta": torch.randn(1, 3, 2, generator=generator())}
    routed = RoutedMatrix(nn.Linear(4, 3), SideMemory(tensors, (1.0,)), transposed=False)
    keys = torch.randn(10, 4, generator=generator(1))
    expected = (keys[:, [0, 2]] @ tensors["delta"][0].T).norm(dim=-1, keepdim=True)
    assert torch.allclose(scores(routed, keys, batch=batch), expected, atol=1e-6)


# --- the manifest ---


def some_manifest(memories: int = 2) -> Manifest:
    chance = generator(8)
    tensors = {
        "columns": torch.arange(3 * memories).view(memories, 3),
        "delta": torch.randn(memories, 4, 3, generator=chance),
        "probes": torch.randn(5, 6, generator=chance).half(),
        "owner": torch.arange(5) % memories,
        "directions": torch.randn(2, 6, generator=chance),
        "gains": torch.randn(2, generator=chance),
    }
    calibrations = tuple(
        calibrate(torch.rand(9, generator=chance), torch.rand(9, generator=chance), rule=rule, false_alarm=0.1)
        for rule in ("minimum", "false-alarm")[:memories]
    )
    edits = (
        Edit("a", "The Lark sails to", "Bergen", subject="The Lark", locality=(Probe("Six and six is", "twelve"),)),
        Edit("b", "Zoë lives in", "区", op="insert", rephrases=("Zoë's home is",)),
    )
    return Manifest(
        model="someone/model",
        revision="abc",
        fingerprint=Fingerprint("1" * 64, "2" * 64),
        site=Site("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=4, d_ff=6),
        memory=SideMemory(tensors, tuple(c.threshold for c in calibrations), "key", "sequence", 1.25),
        calibrations=calibrations,
        owners=(("a",), ("b",))[:memories],
        merge={"method": "ties", "density": 0.5},
        edits=edits,
        versions={"wisecli": "0"},
    )


@pytest.mark.parametrize(("file", "prefix"), [(MEMORY_NAME, ""), ("model-wise.safetensors", "model.layers.2.mlp.")])
@pytest.mark.parametrize("memories", [1, 2])
def test_a_memory_survives_being_written(tmp_path: Path, file: str, prefix: str, memories: int) -> None:
    manifest = some_manifest(memories)
    write_memory(tmp_path, manifest, file=file, prefix=prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file, MANIFEST_NAME])
    loaded = read_memory(tmp_path)
    for name in ("model", "revision", "fingerprint", "site", "calibrations", "owners", "merge", "edits", "versions"):
        assert getattr(loaded, name) == getattr(manifest, name), name
    assert loaded.memory.tensors.keys() == manifest.memory.tensors.keys()
    for name, tensor in manifest.memory.tensors.items():
        assert loaded.memory.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.memory.tensors[name], tensor)
    for name in ("thresholds", "router", "routing", "floor"):
        assert getattr(loaded.memory, name) == getattr(manifest.memory, name)


def test_the_manifest_tells_what_each_memory_is_for(tmp_path: Path) -> None:
    manifest = some_manifest()
    write_memory(tmp_path, manifest)
    content = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert content["schema"] == "wise.memory/1"
    assert content["base"] == {"model": "someone/model", "revision": "abc", "matrix": "1" * 64, "config": "2" * 64}
    assert (content["routing"], content["site"]["layer"]) == ("sequence", 2)
    for record, owned, calibration in zip(content["memories"], manifest.owners, manifest.calibrations, strict=True):
        assert (record["kind"], record["router"], record["edits"]) == ("matrix", "key", list(owned))
        assert record["threshold"] == calibration.threshold
        assert math.isfinite(record["misses"] + record["false_alarms"])


def test_an_altered_memory_is_refused(tmp_path: Path) -> None:
    write_memory(tmp_path, some_manifest())
    path = tmp_path / MEMORY_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"memory\.safetensors: its sha256 differs"):
        read_memory(tmp_path)


def test_a_truncated_or_missing_memory_is_refused(tmp_path: Path) -> None:
    write_memory(tmp_path, some_manifest())
    path = tmp_path / MEMORY_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"memory\.safetensors: not a whole"):
        read_memory(tmp_path)
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"memory\.safetensors: no such file"):
        read_memory(tmp_path)


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"router\.json: no such file"):
        read_memory(tmp_path)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no base": lambda content: content.pop("base"),
    "base without matrix": lambda content: content["base"].pop("matrix"),
    "base is a text": lambda content: content.update(base="x"),
    "no site": lambda content: content.pop("site"),
    "site without layer": lambda content: content["site"].pop("layer"),
    "site with more": lambda content: content["site"].update(depth=3),
    "no memories": lambda content: content.pop("memories"),
    "memories are a number": lambda content: content.update(memories=5),
    "memory without threshold": lambda content: content["memories"][0].pop("threshold"),
    "memory without edits": lambda content: content["memories"][0].pop("edits"),
    "no memory": lambda content: content.pop("memory"),
    "memory without file": lambda content: content["memory"].pop("file"),
    "thresholds are a number": lambda content: content["memory"].update(thresholds=0.5),
    "no router": lambda content: content["memory"].pop("router"),
    "no digests": lambda content: content.pop("sha256"),
    "no digest of the file": lambda content: content["sha256"].clear(),
    "another digest": lambda content: content["sha256"].update({MEMORY_NAME: "0" * 64}),
    "no edits": lambda content: content.pop("edits"),
    "edit without target": lambda content: content["edits"][0].pop("target"),
    "edit with more": lambda content: content["edits"][0].update(colour="red"),
    "edit is a text": lambda content: content["edits"].append("x"),
    "no versions": lambda content: content.pop("versions"),
    "another schema": lambda content: content.update(schema="wise.memory/2"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    write_memory(tmp_path, some_manifest())
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedFileError):
        read_memory(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    write_memory(tmp_path, some_manifest())
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DamagedFileError, match=r"router\.json"):
        read_memory(tmp_path)
