"""A model whose layers are read as they run does what it does when it is held whole, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIGS, VARIANTS
from helpers import random_rows, save_tiny, site_of

from wisecli.capture import Activations, capture, captured
from wisecli.encode import Batch, collate
from wisecli.generation import generate
from wisecli.models import Loaded, load_model

BATCHES = [
    collate(random_rows((1, 2), (4, 1), (11, 3), (7, 6), (2, 5))),
    collate(random_rows((3, 2), (9, 1), seed=2)),
    collate(random_rows((6, 3), (6, 3), seed=3)),
]
PROMPTS = ["ba be bi bo", "da", "ka ke ki ko ku la le"]
LAYERS = (0, 2, 3)


def both(directory: Path, budget: int = 1) -> tuple[Loaded, Loaded]:
    whole, streamed = load_model(directory, device="cpu"), load_model(directory, device="cpu", memory_budget=budget)
    assert whole.stream is None
    assert streamed.stream is not None
    return whole, streamed


@pytest.fixture(scope="module", params=[*sorted(TINY_CONFIGS), *sorted(VARIANTS)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Loaded]:
    """Each architecture in each of its forms, held whole and streamed."""
    return both(save_tiny(tmp_path_factory.mktemp("streaming") / "model", str(request.param)))


def assert_same(found: Activations, expected: Activations) -> None:
    assert (found.first, found.tuple_width, found.multiplier) == (
        expected.first,
        expected.tuple_width,
        expected.multiplier,
    )
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.past) == len(expected.past)
    for own, other in zip(found.past, expected.past, strict=True):
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])
    assert (found.output is None) == (expected.output is None)
    if found.output is not None and expected.output is not None:
        assert torch.equal(found.output, expected.output)


@torch.no_grad()
def logits_of(loaded: Loaded, batch: Batch) -> torch.Tensor:
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    logits: torch.Tensor = loaded.model(**given).logits
    return logits


def test_the_whole_pass_gives_the_same_logits(pair: tuple[Loaded, Loaded]) -> None:
    whole, streamed = pair
    for batch in BATCHES:
        assert torch.equal(logits_of(streamed, batch), logits_of(whole, batch))


def test_the_same_answers_are_generated(pair: tuple[Loaded, Loaded]) -> None:
    whole, streamed = pair
    for sampling in (None, 3):
        found, expected = (
            generate(one.model, one.tokenizer, PROMPTS, max_new_tokens=6, sampling_seed=sampling)
            for one in (streamed, whole)
        )
        assert found == expected


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_sweep_captures_what_single_passes_do(pair: tuple[Loaded, Loaded], layer: int, window: bool) -> None:
    whole, streamed = pair
    site = site_of(whole.model, layer)
    found = captured(streamed.model, site, BATCHES, stream=streamed.stream, labelled=True, window=window)
    for activations, batch in zip(found, BATCHES, strict=True):
        expected = capture(whole.model, site, batch, select=batch.labelled)
        assert_same(activations, expected.from_window() if window else expected)
