import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from wisecli.errors import DamagedFileError, ModelError
from wisecli.io.checkpoint import Checkpoint, load_tensors, open_tensors, read_json, save_tensors, write_json
from wisecli.io.digest import sha256_file, sha256_json, sha256_tensor
from wisecli.models.model_files import resolve_model


def some_tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b.weight": torch.arange(4, dtype=torch.bfloat16),
        "c.weight": torch.arange(8, dtype=torch.int32).view(2, 2, 2),
    }


def single(directory: Path) -> Path:
    save_file(some_tensors(), directory / "model.safetensors")
    return directory


def sharded(directory: Path) -> Path:
    tensors = some_tensors()
    files = {"model-1.safetensors": ["a.weight", "c.weight"], "model-2.safetensors": ["b.weight"]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# --- checkpoints ---


@pytest.mark.parametrize("layout", [single, sharded])
def test_a_checkpoint_gives_every_tensor_as_it_was_saved(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    checkpoint = Checkpoint(layout(tmp_path))
    expected = some_tensors()
    assert sorted(checkpoint) == sorted(expected)
    for name, tensor in expected.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
    assert "d.weight" not in checkpoint


def test_a_checkpoint_knows_which_file_holds_a_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    assert checkpoint.files == [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    assert checkpoint.file_of("b.weight") == "model-2.safetensors"
    assert checkpoint.file_of("c.weight") == "model-1.safetensors"


def test_a_checkpoint_reads_only_the_file_it_needs(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    (tmp_path / "model-2.safetensors").unlink()
    assert torch.equal(checkpoint.load("a.weight"), some_tensors()["a.weight"])
    with pytest.raises(DamagedFileError, match=r"model-2\.safetensors"):
        checkpoint.load("b.weight")


def test_shapes_come_from_the_header_alone(tmp_path: Path) -> None:
    header = json.dumps({"big": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 32]}}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 32))  # sparse: four gigabytes that take no room
    if path.stat().st_blocks * 512 > 1 << 24:
        pytest.skip("the file system has no sparse files")
    assert Checkpoint(tmp_path).shape("big") == (1 << 20, 1 << 10)


def test_one_file_beats_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(Checkpoint(tmp_path)) == ["a.weight"]


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"model-2\.safetensors: no such file"):
        Checkpoint(tmp_path)


def test_a_tensor_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["d.weight"] = "model-2.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"tensor d\.weight is in no file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "", "\x00"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"index\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "remedy"), [("pytorch_model.bin", "save_pretrained"), ("notes.txt", "convert its weights to safetensors")]
)
def test_a_directory_without_safetensors_is_refused(tmp_path: Path, file: str, remedy: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=remedy):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept", ["nothing", "half the header", "half the values", "all but a byte"])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: str) -> None:
    path = single(tmp_path) / "model.safetensors"
    whole = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    sizes = {
        "nothing": 0,
        "half the header": header // 2,
        "half the values": (header + whole) // 2,
        "all but a byte": whole - 1,
    }
    cut(path, sizes[kept])
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        load_tensors(path)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<!doctype html><html>not found</html>" * 9)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


# --- tensor files and digests ---


def test_tensors_survive_being_written_even_when_they_are_views(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {"turned": base.T, "columns": base[:, ::2], "half": base.half(), "whole": base.requires_grad_()}
    save_tensors(tmp_path / "x.safetensors", tensors, {"kind": "test"})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    with open_tensors(tmp_path / "x.safetensors") as stream:
        assert stream.metadata()["kind"] == "test"


def test_a_digest_is_checked(tmp_path: Path) -> None:
    path = single(tmp_path) / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_tensors(path, digest=digest).keys() == some_tensors().keys()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_tensors(path).keys() == some_tensors().keys()
    with pytest.raises(DamagedFileError, match="its sha256 differs"):
        load_tensors(path, digest=digest)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    content = bytes(range(256)) * (size // 256 + 1)
    path.write_bytes(content[:size])
    assert sha256_file(path) == hashlib.sha256(content[:size]).hexdigest()


def test_the_digest_of_a_tensor_is_that_of_its_values_in_row_order() -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert sha256_tensor(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert sha256_tensor(tensor.T) == hashlib.sha256(tensor.numpy().T.tobytes()).hexdigest()
    assert sha256_tensor(tensor) != sha256_tensor(tensor.T)
    assert sha256_tensor(tensor.bfloat16()) == hashlib.sha256(tensor.bfloat16().view(torch.int16).numpy()).hexdigest()


def test_the_digest_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": "é"}) == sha256_json({"b": "é", "a": 1})
    assert len({sha256_json(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, [1], [1, 1], "1")}) == 6


def test_json_survives_being_written(tmp_path: Path) -> None:
    value = {"name": "Zoë 区", "numbers": [1, 0.1, None, True]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff{}"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"x\.json"):
        read_json(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DamagedFileError, match="no such file"):
        load_tensors(tmp_path / "x.safetensors")


# --- models ---


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been fetched from the hub; nothing is."""
    asked: list[str] = []

    def download(model: str, **_: object) -> str:
        asked.append(model)
        raise ConnectionError("no network in this test\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_directory_is_taken_as_it_is(tmp_path: Path, downloads: list[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert downloads == []


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "../model", "a/b/c", "model/", "~/models/x", "."])
def test_a_path_that_is_no_model_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str], model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        resolve_model(model)
    assert downloads == []


@pytest.mark.parametrize("kind", ["file", "directory without config.json"])
def test_something_else_than_a_model_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        Path("model").write_text("x")
    else:
        Path("model").mkdir()
    with pytest.raises(ModelError, match=r"^model "):
        resolve_model("model")
    assert downloads == []


def test_a_hub_id_that_cannot_be_fetched_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve_model("someone/model")
    assert downloads == ["someone/model"]
    assert "someone/model" in str(caught.value)
    assert "(no network in this test)" in str(caught.value)


@pytest.mark.parametrize("model", ["not an id", "a" * 200, "name--with--dashes", "x/.git"])
def test_a_name_that_can_be_no_hub_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError):
        resolve_model(model)


def test_saved_tensors_are_plain_safetensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", some_tensors())
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in some_tensors().items())


@pytest.mark.parametrize(
    "quantised", [torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool, torch.float16]
)
def test_a_rounded_sample_is_that_of_the_weights_in_bfloat16(tmp_path: Path, quantised: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    wide = {"a.weight": torch.randn(6, 4, generator=chance), "b.weight": torch.randn(5, generator=chance)}
    packed = {"c.weight": torch.ones(4, 4).to(quantised), "d.weight": torch.empty(0, 4)}

    def sample(name: str, tensors: dict[str, Tensor]) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return Checkpoint(tmp_path / name).rounded_sample

    plain = sample("plain", wide | packed)
    assert sample("half", {name: one.bfloat16() for name, one in wide.items()} | packed) == plain
    assert sample("tuned", {name: one + 0.01 for name, one in wide.items()} | packed) != plain
    assert sample("other", wide | packed | {"c.weight": torch.zeros(4, 4).to(quantised)}) != plain


def test_a_model_that_was_trained_on_has_another_sample(tmp_path: Path) -> None:
    base = Checkpoint(save_tiny(tmp_path / "base"))
    assert Checkpoint(save_tiny(tmp_path / "again")).sample == base.sample
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned.get_submodule("model.layers.1.self_attn.o_proj").weight.data *= 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    assert Checkpoint(tmp_path / "tuned").sample != base.sample


def test_a_single_number_has_a_digest_as_a_row_of_one_has() -> None:
    assert sha256_tensor(torch.tensor(0.5)) == sha256_tensor(torch.tensor([0.5])) != sha256_tensor(torch.tensor(0.25))
