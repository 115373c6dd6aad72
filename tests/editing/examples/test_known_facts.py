from pathlib import Path

import pytest
import torch
from support.every_type import save_type
from support.helpers import alone, random_rows, save_tiny
from support.loading import CPU
from support.thorough import few
from support.tiny_models import TINY_CONFIGS, TYPICAL

from wisecli.config import LoadOptions
from wisecli.editing.examples.known_facts import known_rows
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Row
from wisecli.progress import Event, ignore_progress


@pytest.fixture(scope="module", params=few(sorted(TINY_CONFIGS), TYPICAL))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("known") / "model", str(request.param))


def continued(loaded: Loaded, row: Row, count: int) -> Row:
    """A row whose target is what the model says."""
    said: list[int] = []
    for _ in range(count):
        said.append(int(alone(loaded.model, Row((*row.prompt, *said), (0,)))[-1].argmax()))
    return Row(row.prompt, tuple(said))


def test_rows_are_known_if_the_model_says_every_token(place: Path) -> None:
    loaded = load_model(place, load=CPU)
    drawn = random_rows((3, 2), (1, 1), (7, 3), (4, 4))
    rows = [continued(loaded, row, len(row.target)) for row in drawn]
    last = rows[2].target[-1]
    rows += [Row(rows[2].prompt, (*rows[2].target[:-1], (last + 1) % 50)), *drawn]
    expected = {
        number
        for number, row in enumerate(rows)
        if torch.equal(alone(loaded.model, row).argmax(-1), torch.tensor(row.target))
    }
    assert {0, 1, 2, 3} <= expected
    assert 4 not in expected
    for size in (1, 3, 32):
        assert known_rows(loaded, rows, batch_size=size, on_progress=ignore_progress) == expected


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1"])
def test_recurrent_models_are_asked_too(tmp_path: Path, model_type: str) -> None:
    loaded = load_model(save_type(tmp_path, model_type), load=CPU)
    drawn = random_rows((3, 2), (4, 1))
    rows = [*(continued(loaded, row, 2) for row in drawn), *drawn]
    assert known_rows(loaded, rows, batch_size=2, on_progress=ignore_progress) >= {0, 1}


def test_a_streamed_model_reads_each_layer_once_and_says_the_same(place: Path) -> None:
    whole, streamed = load_model(place, load=CPU), load_model(place, load=LoadOptions(device="cpu", memory_budget=1))
    drawn = random_rows((3, 2), (1, 1), (7, 3), (4, 4), (2, 2))
    rows = [*(continued(whole, row, 2) for row in drawn), *drawn]
    assert streamed.stream is not None
    before = streamed.stream.bytes_read
    events: list[Event] = []
    found = known_rows(streamed, rows, batch_size=2, on_progress=events.append)
    assert found == known_rows(whole, rows, batch_size=2, on_progress=ignore_progress)
    assert (events[-1].done, events[-1].total) == (10, 10)
    read = streamed.stream.bytes_read - before
    again = streamed.stream.bytes_read
    known_rows(streamed, rows[:2], batch_size=2, on_progress=ignore_progress)
    assert read == streamed.stream.bytes_read - again > 0
