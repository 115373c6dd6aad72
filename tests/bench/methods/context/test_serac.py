from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rivals import EDITS, TEXTS, TRAIN, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.base import METHODS, Bench
from wisecli.bench.methods.context.serac import Embedder, Serac, StateIndex
from wisecli.bench.methods.evaluation import BaseModelAnswers, MethodSubject
from wisecli.models.running.hooks import hooked

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
BACKGROUND = [*(edit.prompt for edit in TRAIN), *TEXTS]


@contextmanager
def counted_passes(bench: Bench) -> Iterator[list[None]]:
    """The passes of the model, as they are made."""
    passes: list[None] = []
    with hooked(bench.loaded.model.register_forward_pre_hook(lambda *_: passes.append(None))):
        yield passes


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
        assert serac.rewritten_prompt(prompt) == (
            f"New Fact: {edit.prompt} {edit.target}\nPrompt: {prompt}" if inside else prompt
        )
        told += inside
    assert told >= len(EDITS)
    serac.threshold = 0.99
    assert [prompt for prompt in prompts if serac.rewritten_prompt(prompt) != prompt] == [edit.prompt for edit in EDITS]
    require_untouched_outside(bench, serac, *before)


def test_a_prompt_is_read_each_time_that_it_is_asked_and_what_is_stored_once(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    serac = METHODS["serac"](bench)
    with counted_passes(bench) as passes:
        serac.edit(EDITS[:3])
        stored = len(passes)
        serac.edit(EDITS[:3])
        assert len(passes) == stored == 1
        for _ in range(2):
            serac.rewritten_prompt(EDITS[0].prompt)
        assert len(passes) == stored + 2


def test_overhead_counts_what_finding_a_fact_takes(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    serac = METHODS["serac"](bench)
    serac.edit(EDITS[:1])
    subject = MethodSubject(bench.loaded, serac, BaseModelAnswers(), batch_size=4)
    with counted_passes(bench) as passes:
        subject.overhead([(EDITS[0].prompt, EDITS[0].target)])
    # Three rounds, each of the unedited model, and of the edited one behind the classifier's own pass.
    assert len(passes) == 3 * (1 + 2)
