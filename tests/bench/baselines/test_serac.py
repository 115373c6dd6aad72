from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.rivals import EDITS, TEXTS, TRAIN, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.baselines.base import METHODS, Bench, UnsuitableError
from wisecli.bench.baselines.serac import Embedder, Serac, StateIndex

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
BACKGROUND = [*(edit.prompt for edit in TRAIN), *TEXTS]


@torch.no_grad()
def mean_state(bench: Bench, text: str) -> np.ndarray:
    ids = torch.tensor([bench.loaded.tokenizer(text)["input_ids"]])
    return bench.loaded.model.base_model(input_ids=ids).last_hidden_state[0].double().numpy().mean(0)


def cosine(bench: Bench, one: str, other: str) -> float:
    middle = np.mean([mean_state(bench, text) for text in BACKGROUND], 0)
    first, second = (mean_state(bench, text) - middle for text in (one, other))
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@BOTH
def test_scores_are_cosines_of_centred_mean_states(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    index = StateIndex(Embedder(bench), BACKGROUND)
    index.add([edit.prompt for edit in EDITS[:1]])
    index.add([])
    index.add([edit.prompt for edit in EDITS[1:]])
    for text in ("ba", "ta te ba ro ru ma me ma", EDITS[0].prompt):
        expected = [cosine(bench, text, edit.prompt) for edit in EDITS]
        assert index.scores(text).tolist() == pytest.approx(expected, abs=1e-4)
    assert index.bytes() == 4 * (len(EDITS) + 1) * 32


@BOTH
def test_prompts_in_scope_are_told_the_nearest_fact(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    serac, before = METHODS["serac"](bench), snapshot(bench)
    assert isinstance(serac, Serac)
    serac.edit(EDITS)
    told = 0
    prompts = [*(edit.prompt for edit in EDITS), "ba be bi bo", "ro ru", "ta to", "ma me mi"]
    for prompt in prompts:
        scores = [cosine(bench, prompt, edit.prompt) for edit in EDITS]
        edit = EDITS[int(np.argmax(scores))]
        inside = max(scores) > serac.threshold
        assert serac.asked(prompt) == (f"New Fact: {edit.prompt} {edit.target}\nPrompt: {prompt}" if inside else prompt)
        told += inside
    assert told >= len(EDITS)
    serac.threshold = 0.99
    assert [prompt for prompt in prompts if serac.asked(prompt) != prompt] == [edit.prompt for edit in EDITS]
    require_untouched_outside(bench, serac, *before)


def test_without_records_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableError, match="serac needs records of the train split"):
        Serac(tiny_bench(tmp_path / "model", train=[]))
