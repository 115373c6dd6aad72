import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from support.ready import Ready
from support.tiny_models import Wise
from torch import Tensor

from wisecli.export import weights
from wisecli.export.weights import Packing, overwrite, write_stream, write_weights
from wisecli.io.checkpoint import SINGLE_NAME, Checkpoint
from wisecli.io.safetensors_header import TensorLayout, read_header

TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool", "uint8")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_streamed_files_hold_the_tensors_for_the_formats_own_reader(
    shapes: dict[str, tuple[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("stream") / "some.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(getattr(torch, dtype))
        for name, (dtype, shape) in shapes.items()
    }
    layouts = {name: TensorLayout(dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()}
    write_stream(path, layouts, tensors.__getitem__)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_header(path).tensors == layouts
    with safe_open(path, framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_files_are_copied_byte_for_byte_or_linked(tmp_path: Path, shard: str | None) -> None:
    base = save_tiny(tmp_path / "base", shard=shard)
    for link in (False, True):
        output = tmp_path / f"out-{link}"
        output.mkdir()
        files = write_weights(output, Checkpoint(base), Packing(link=link), single="other.safetensors")
        for path in base.glob("*.safetensors"):
            copy = output / ("other.safetensors" if shard is None else path.name)
            assert copy.read_bytes() == path.read_bytes()
            assert copy.samefile(path) == link
        assert files.keys() == tensors_of(base).keys()
        assert set(files.values()) == {path.name for path in output.iterdir()}


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("limit", [None, 1, 30_000, 10**9])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_tensors_are_converted_and_cut_into_files_of_the_size_asked_for(
    tmp_path: Path, shard: str | None, limit: int | None, dtype: torch.dtype | None
) -> None:
    base, output = save_tiny(tmp_path / "base", shard=shard), tmp_path / "out"
    output.mkdir()
    files = write_weights(output, Checkpoint(base), Packing(dtype=dtype, file_bytes=limit))
    before, after = tensors_of(base), tensors_of(output)
    assert before.keys() == after.keys() == files.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(dtype or tensor.dtype))
        assert name in load_file(output / files[name])
    for path in output.iterdir():
        held = load_file(path)
        size = sum(tensor.nbytes for tensor in held.values())
        assert limit is None or size <= limit or len(held) == 1
    if limit == 1:
        assert len(list(output.iterdir())) == len(before)


def test_whole_numbers_are_not_converted(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = {"half": torch.ones(3), "counts": torch.arange(4)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", Checkpoint(tmp_path / "base"), Packing(dtype=torch.bfloat16))
    found = tensors_of(tmp_path / "out")
    assert (found["half"].dtype, found["counts"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize("packing", [Packing(), Packing(link=True), Packing(file_bytes=30_000)], ids=str)
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_a_replaced_tensor_is_the_only_difference_and_the_base_stays(
    tmp_path: Path, packing: Packing, shard: str | None
) -> None:
    base, output = save_tiny(tmp_path / "base", shard=shard), tmp_path / "out"
    output.mkdir()
    before = tensors_of(base)
    name = next(name for name in before if "down_proj" in name)
    write_weights(output, Checkpoint(base), packing, replaced={name: before[name] + 1})
    after = tensors_of(output)
    assert [other for other in before if not torch.equal(before[other], after[other])] == [name]
    assert torch.equal(after[name], before[name] + 1)
    unchanged = tensors_of(base)
    assert all(torch.equal(unchanged[other], before[other]) for other in before)


def test_overwriting_converts_to_the_stored_type(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    tensors = {"a": torch.zeros(2, 3).half(), "b": torch.ones(4)}
    save_file(tensors, path)
    overwrite(path, "a", torch.full((2, 3), 0.1))
    assert torch.equal(load_file(path)["a"], torch.full((2, 3), 0.1).half())
    assert torch.equal(load_file(path)["b"], tensors["b"])
    json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to write on")
    with tempfile.TemporaryDirectory(dir=memory) as found:
        yield Path(found)


def test_links_to_another_file_system_are_refused_with_the_way_out(ready: Ready, wise: Wise, elsewhere: Path) -> None:
    """Bug reports on model caches: the cache is on another disk, and hard links into it fail with EXDEV."""
    refused = wise("export", "--link", "--memory", ready.memory, "-o", str(elsewhere / "edited"))
    assert refused.code == 2
    assert "hard links need one file system, and that is on another" in refused.err
    assert "--link=auto" in refused.err
    assert str(elsewhere) in refused.err
    assert ".wise-" not in refused.err
    assert list(elsewhere.iterdir()) == []


def test_what_cannot_be_linked_is_copied_if_that_will_do(ready: Ready, wise: Wise, elsewhere: Path) -> None:
    """Bug reports on model caches: the cache is on another disk."""
    line = ("export", "--link=auto", "--memory", ready.memory, "-o", str(elsewhere / "edited"))
    assert wise(*line).code == 0
    assert all(path.stat().st_nlink == 1 for path in (elsewhere / "edited").iterdir())
    assert wise("verify", str(elsewhere / "edited")).code == 0
    assert "up to date" in wise(*line).out


def test_what_can_be_linked_is_linked(ready: Ready, wise: Wise) -> None:
    model = Path(ready.model) / SINGLE_NAME
    for place, line in enumerate((["--link"], ["--link", ready.model], ["--link=auto"], ["--link=always"])):
        assert wise("export", *line, "--memory", ready.memory, "-o", f"edited-{place}").code == 0
        assert any(path.samefile(model) for path in Path(f"edited-{place}").iterdir())
    assert wise("export", "--link=sometimes", "--memory", ready.memory).code == 2


def test_a_disk_that_has_no_links_says_so(ready: Ready, wise: Wise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug reports on model caches: FAT and some network file systems have none."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(weights.os, "link", refuse)
    outcome = wise("export", "--link", "--memory", ready.memory)
    assert (outcome.code, "it cannot be linked there (Operation not permitted)" in outcome.err) == (2, True)
    assert wise("export", "--link=auto", "--memory", ready.memory).code == 0
