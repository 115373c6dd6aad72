"""One pass over a prompt and an answer says what answering token by token does."""

from pathlib import Path

import pytest
import torch
from support.gates import Keys, random_keys, write_keys
from support.helpers import WORDS, memory_for, save_tiny
from support.loading import CPU

from wisecli.export.stock.one_pass import changed_by, goes_on_with, next_tokens
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import generate
from wisecli.progress import ignore_progress

LAYER, LENGTH = 2, 4
BEGINNING = " ".join(WORDS[:9])
TEXTS = [*(f"{BEGINNING} {word}" for word in WORDS[20:32]), *WORDS[:4], " ".join(WORDS[5:12])]


def stock(root: Path, keys: Keys) -> Loaded:
    """A tiny model with keys in a block."""
    base, output = save_tiny(root / "base"), root / "stock"
    output.mkdir()
    checkpoint = Checkpoint(base)
    write_keys(output, base, checkpoint, find_site(base, checkpoint, LAYER), keys)
    return load_model(output, CPU)


@pytest.fixture
def gated(tmp_path: Path) -> Loaded:
    return stock(tmp_path, random_keys(5, 32))


def prompts_of(loaded: Loaded) -> list[tuple[int, ...]]:
    return [tuple(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]


def test_answers_are_recognized(gated: Loaded) -> None:
    prompts = prompts_of(gated)
    answers = [tuple(one) for one in generate(gated.model, gated.tokenizer, TEXTS, max_new_tokens=LENGTH)]
    rows = [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert all(goes_on_with(gated, rows, LENGTH, ignore_progress, "texts"))
    other = [Row(row.prompt, (*row.target[:-1], row.target[-1] ^ 1)) for row in rows]
    assert not any(goes_on_with(gated, other, LENGTH, ignore_progress, "texts"))


def test_an_answer_that_goes_on_is_another(gated: Loaded) -> None:
    prompts = prompts_of(gated)
    answers = generate(gated.model, gated.tokenizer, TEXTS, max_new_tokens=LENGTH)
    rows = [Row(prompt, tuple(answer[:2])) for prompt, answer in zip(prompts, answers, strict=True)]
    assert not any(goes_on_with(gated, rows, LENGTH, ignore_progress, "texts"))
    gated.model.generation_config.eos_token_id = answers[0][2]
    assert goes_on_with(gated, rows[:1], LENGTH, ignore_progress, "texts") == [True]


def test_a_routed_model_decides_on_the_prompt_alone(tmp_path: Path) -> None:
    base = save_tiny(tmp_path)
    loaded = load_model(base, CPU)
    site = find_site(base, Checkpoint(base), LAYER)
    prompts = prompts_of(loaded)
    before = generate(loaded.model, loaded.tokenizer, TEXTS, max_new_tokens=LENGTH)
    site.install(loaded.model, memory_for(loaded.model, site, kind="facts", memories=3))
    answers = [tuple(one) for one in generate(loaded.model, loaded.tokenizer, TEXTS, max_new_tokens=LENGTH)]
    assert [list(one) for one in answers] != before
    rows = [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert all(goes_on_with(loaded, rows, LENGTH, ignore_progress, "texts"))


@torch.no_grad()
def test_the_next_tokens_are_those_of_each_row_alone(gated: Loaded) -> None:
    rows = [Row(prompt, ()) for prompt in prompts_of(gated)]
    wanted = [gated.model(input_ids=torch.tensor([row.prompt])).logits[0].argmax(-1).tolist() for row in rows]
    assert next_tokens(gated, rows, ignore_progress) == wanted


def test_blocks_change_the_rows_that_open_a_key(tmp_path: Path) -> None:
    keys = random_keys(1, 32)
    loaded = stock(tmp_path, keys)
    rows, blocks = [Row(prompt, ()) for prompt in prompts_of(loaded)], range(LAYER + 1, LAYER + 2)
    found = changed_by(loaded, loaded.model.model.layers, blocks, 32, rows, ignore_progress)
    base = load_model(tmp_path / "base", CPU)
    for row, changed in zip(rows, found, strict=True):
        with torch.no_grad():
            one, other = (model.model(input_ids=torch.tensor([row.prompt])).logits for model in (loaded, base))
        assert changed == bool((one - other).abs().max() > 1e-3)
    shut = Keys(torch.zeros_like(keys.directions), torch.full_like(keys.offsets, -100.0), keys.values)
    (tmp_path / "shut").mkdir()
    loaded = stock(tmp_path / "shut", shut)
    assert not any(changed_by(loaded, loaded.model.model.layers, blocks, 32, rows, ignore_progress))
