from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wisecli.models.streaming.tensor_spill import Spool


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def files(scratch: Path) -> list[Path]:
    return [path for path in scratch.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.long])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_what_is_put_is_taken(dtype: torch.dtype, budget: int) -> None:
    tensor = (torch.randn(3, 4, 5) * 9).to(dtype)
    with Spool(budget) as spool:
        spool.put("one", tensor)
        spool.put("other", tensor[1:, :, 2:].transpose(0, 1))
        assert torch.equal(spool.take("other"), tensor[1:, :, 2:].transpose(0, 1))
        assert torch.equal(spool.take("one"), tensor)
        assert len(spool) == 0


def test_only_what_exceeds_the_budget_goes_to_the_disk(scratch: Path) -> None:
    tensors = {str(number): torch.randn(10) for number in range(4)}
    with Spool(100) as spool:
        for name, tensor in tensors.items():
            spool.put(name, tensor)
        assert len(files(scratch)) == 2
        assert spool.written == 80
        for name, tensor in tensors.items():
            assert torch.equal(spool.take(name), tensor)
        assert files(scratch) == []


def test_room_is_given_back_when_a_tensor_is_taken(scratch: Path) -> None:
    with Spool(40) as spool:
        for number in range(5):
            spool.put("same", torch.full((10,), float(number)))
            assert float(spool.take("same")[0]) == number
        assert files(scratch) == []


def test_a_name_that_is_put_again_holds_the_newer_tensor(scratch: Path) -> None:
    for budget in (0, 40, 100):
        with Spool(budget) as spool:
            spool.put("name", torch.zeros(10))
            spool.put("name", torch.ones(10))
            assert len(spool) == 1
            assert torch.equal(spool.take("name"), torch.ones(10))
            assert files(scratch) == []


def test_a_view_does_not_keep_what_it_looks_at() -> None:
    with Spool(100) as spool:
        spool.put("view", torch.zeros(1000)[:10])
        assert spool.take("view").untyped_storage().nbytes() == 40


def test_nothing_is_left_on_the_disk(scratch: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"), Spool(0) as spool:
        spool.put("name", torch.zeros(10))
        assert len(files(scratch)) == 1
        raise RuntimeError("power cut")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("budget", [0, 100])
def test_what_nobody_put_cannot_be_taken(budget: int) -> None:
    with Spool(budget) as spool:
        spool.put("name", torch.zeros(10))
        spool.take("name")
        with pytest.raises(KeyError):
            spool.take("name")


@given(st.integers(0, 200), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20)), max_size=12))
def test_it_holds_what_a_dictionary_holds(budget: int, steps: list[tuple[str, int]]) -> None:
    expected: dict[str, torch.Tensor] = {}
    with Spool(budget) as spool:
        for number, (name, size) in enumerate(steps):
            if name in expected and size % 2:
                assert torch.equal(spool.take(name), expected.pop(name))
            else:
                expected[name] = torch.full((size,), float(number))
                spool.put(name, expected[name])
            assert len(spool) == len(expected)
        for name, tensor in expected.items():
            assert torch.equal(spool.take(name), tensor)
