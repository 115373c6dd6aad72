import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drawing import seeded
from torch import Tensor

from wisecli.artifacts.memory_manifest import (
    MANIFEST_NAME,
    MEMORY_NAME,
    Made,
    Manifest,
    Origin,
    read_memory,
    write_manifest,
    write_memory,
    write_tensors,
)
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.models.layout.site import Fingerprint, MatrixSite
from wisecli.routing.memories.calibration import calibrate
from wisecli.routing.memories.side_memory import SideMemory


def lookup_of(edits: int, chance: torch.Generator) -> dict[str, Tensor]:
    """A key of a prompt's end and one inside the answer of every edit, and its prompt's tokens."""
    every = torch.arange(edits)
    return {
        "residuals": torch.randn(4, 4, generator=chance).half(),
        "key_to_residual": torch.arange(2 * edits) % 4,
        "whitened_keys": torch.randn(2 * edits, 6, generator=chance).half(),
        "key_to_edit": torch.arange(2 * edits) % edits,
        "cosine_offset": torch.rand(2 * edits, generator=chance),
        "whitening_index": torch.arange(2 * edits) // edits,
        "directions": torch.randn(2, 2, 6, generator=chance),
        "gains": torch.randn(2, 2, generator=chance),
        "floors": torch.rand(2, generator=chance),
        "late_interaction.proj_weight": torch.randn(2, 3, 4, generator=chance),
        "late_interaction.proj_bias": torch.randn(2, 3, generator=chance),
        "late_interaction.logit_scale": torch.ones(2),
        "late_interaction.logit_offset": torch.zeros(2),
        "late_interaction.prompt_token_embeddings": torch.randn(2 * edits, 3, generator=chance).half(),
        "late_interaction.token_to_prompt": torch.arange(2 * edits),
        "late_interaction.token_weights": torch.ones(2 * edits),
        "late_interaction.prompt_to_edit": every,
        "late_interaction.special_token_ids": torch.tensor([0]),
    }


def some_manifest(memories: int = 2, kind: str = "matrix") -> Manifest:
    chance = seeded(8)
    tensors = {
        "columns": torch.arange(3 * memories).view(memories, 3),
        "delta": torch.randn(memories, 4, 3, generator=chance),
    }
    if kind == "lookup":
        tensors = lookup_of(memories, chance)
    calibrations = tuple(
        calibrate(torch.rand(9, generator=chance), torch.rand(9, generator=chance), rule=rule, false_alarm=0.1)
        for rule in ("minimum", "false-alarm")[:memories]
    )
    edits = (
        Edit(
            "a",
            "The Lark sails to",
            "Bergen",
            subject="The Lark",
            locality=(EvaluationPrompt("Six and six is", "twelve"),),
        ),
        Edit("b", "Zoë lives in", "区", op="insert", rephrases=("Zoë's home is",)),
    )
    return Manifest(
        model="someone/model",
        revision="abc",
        fingerprint=Fingerprint("1" * 64, "2" * 64),
        site=MatrixSite("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=4, d_ff=6),
        memory=SideMemory(tensors, tuple(c.threshold for c in calibrations), kind, state_layer=1),
        calibrations=calibrations,
        owners=(("a",), ("b",))[:memories],
        merge={"method": "ties", "density": 0.5},
        edits=edits,
        versions={"wisecli": "0"},
        origins=(
            Origin(
                "shards",
                {"writer": "solve", "shards": None, "mask_ratio": 0.5},
                Made("cpu", "float32", 2),
                ("a", "lost", "b"),
                (Edit("lost", "The Wren sails to", "Oslo"),),
                ("3" * 64, "4" * 64),
                {"torch": "2"},
            ),
        ),
    )


@pytest.mark.parametrize(("file", "prefix"), [(MEMORY_NAME, ""), ("model-wise.safetensors", "model.layers.2.mlp.")])
@pytest.mark.parametrize("memories", [1, 2])
@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_a_memory_survives_being_written(tmp_path: Path, file: str, prefix: str, memories: int, kind: str) -> None:
    manifest = some_manifest(memories, kind)
    digest = write_tensors(tmp_path, manifest, file=file, prefix=prefix)
    write_manifest(tmp_path, manifest, {file: digest}, file=file, prefix=prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file, MANIFEST_NAME])
    loaded = read_memory(tmp_path)
    for name in (
        "model",
        "revision",
        "fingerprint",
        "site",
        "calibrations",
        "owners",
        "merge",
        "edits",
        "versions",
        "origins",
    ):
        assert getattr(loaded, name) == getattr(manifest, name), name
    assert loaded.memory.tensors.keys() == manifest.memory.tensors.keys()
    for name, tensor in manifest.memory.tensors.items():
        assert loaded.memory.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.memory.tensors[name], tensor)
    for name in ("thresholds", "kind", "pooling", "state_layer"):
        assert getattr(loaded.memory, name) == getattr(manifest.memory, name)


def test_the_manifest_tells_what_each_memory_is_for(tmp_path: Path) -> None:
    manifest = some_manifest()
    write_memory(tmp_path, manifest)
    content = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert content["schema"] == "wise.memory/2"
    assert content["base"] == {"model": "someone/model", "revision": "abc", "matrix": "1" * 64, "config": "2" * 64}
    assert (content["memory"]["pooling"], content["site"]["layer"]) == ("last", 2)
    for record, owned, calibration in zip(content["memories"], manifest.owners, manifest.calibrations, strict=True):
        assert (record["kind"], record["router"], record["edits"]) == ("matrix", "norm", list(owned))
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
    with pytest.raises(DamagedFileError, match="holds nothing that `wise` wrote; give a memory"):
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
    "another schema": lambda content: content.update(schema="wise.memory/3"),
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
