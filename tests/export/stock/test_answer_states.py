"""States read while a model answers are those of its answers read anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import WORDS, save_tiny
from support.loading import CPU

from wisecli.export.stock.answer_states import answer_states
from wisecli.export.stock.gate_states import read_states
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import generate
from wisecli.progress import ignore_progress

LENGTH = 5
# As many that begin alike as are read together, and some of other lengths.
BEGINNING = " ".join(WORDS[:10])
TEXTS = [*(f"{BEGINNING} {word}" for word in WORDS[20:30]), *WORDS[:3], " ".join(WORDS[5:12])]
NAMED: dict[str, Any] = {"batch_size": 4, "on_progress": ignore_progress, "stage": "texts"}


@pytest.mark.parametrize("whole", [True, False])
def test_states_are_those_of_texts_and_their_answers(tmp_path: Path, whole: bool) -> None:
    base = save_tiny(tmp_path)
    loaded, site = load_model(base, CPU), find_site(base, Checkpoint(base), 1)
    answers = generate(loaded.model, loaded.tokenizer, TEXTS, max_new_tokens=LENGTH)
    prompts = [tuple(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]
    rows = [
        Row((*prompt, *answer), ()) if whole else Row(prompt, (*answer, 0))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    wanted = [states for states, _ in read_states(loaded, site, rows, **NAMED)]
    found = answer_states(loaded, site, TEXTS, length=LENGTH, whole=whole, **NAMED)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_token_that_ends_an_answer_is_none_of_it(tmp_path: Path) -> None:
    base = save_tiny(tmp_path)
    loaded, site = load_model(base, CPU), find_site(base, Checkpoint(base), 1)
    first = generate(loaded.model, loaded.tokenizer, TEXTS[-1:], max_new_tokens=LENGTH)[0]
    loaded.model.generation_config.eos_token_id = first[1]
    ended = first.index(first[1])
    (found,) = answer_states(loaded, site, TEXTS[-1:], length=LENGTH, whole=False, **NAMED)
    assert len(found) == 1 + ended
