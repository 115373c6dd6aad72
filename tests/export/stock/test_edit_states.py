"""Texts that edits answer are read once each, as a plain pass over prompt and answer reads them."""

from typing import Any

import pytest
import torch
from support.byte_level import save_base
from support.helpers import keys_of, manifest_for, memory_for, states_of
from support.loading import CPU

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.edit_states import ReadTexts, read_texts
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.progress import ignore_progress

LAYER = 2
NAMED: dict[str, Any] = {"batch_size": 4, "on_progress": ignore_progress}
EDITS = [
    Edit("one", "The mayor of Bravik is", "Ole", subject="Bravik"),
    Edit("two", "It is what it is", "so", subject=""),
    Edit("three", "The mayor of Bravik is", "Ta", subject="Bravik"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Manifest, ReadTexts]:
    base = save_base(tmp_path_factory.mktemp("edits") / "base", hidden_size=64, head_dim=16)
    loaded = load_model(base, CPU)
    memory = memory_for(loaded.model, find_site(base, Checkpoint(base), LAYER))
    manifest = manifest_for(base, memory, EDITS, layer=LAYER)
    return loaded, manifest, read_texts(loaded, manifest, **NAMED)


def test_each_text_is_read_once_and_the_last_edit_that_asks_it_answers(
    made: tuple[Loaded, Manifest, ReadTexts],
) -> None:
    _, _, read = made
    assert len(read.numbers()) == len(read.texts)
    assert {one.edit for one in read.texts if one.own} == {1, 2}
    # Of an edit without a subject only its own prompts are read.
    assert {one.edit for one in read.texts if not one.own} == {2}


def test_states_and_what_is_added_are_those_of_a_plain_pass(made: tuple[Loaded, Manifest, ReadTexts]) -> None:
    loaded, manifest, read = made
    answers, epsilon = read.answers(), float(loaded.model.config.rms_norm_eps)
    tensors, found, seen = manifest.memory.tensors, iter(range(len(answers.key))), set[int]()
    for one in read.texts:
        tokens = [*one.row.prompt, *one.row.target[:-1]]
        window = slice(len(one.row.prompt) - 1, None)
        states = states_of(loaded.model, manifest.site, LAYER, tokens)[window]
        normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
        keys = keys_of(loaded.model, manifest.site, tokens)[window]
        for index in range(len(one.row.target)):
            number = next(found)
            key = answers.key[number]
            if one.exact:
                torch.testing.assert_close(answers.states[number], normed[index], rtol=1e-3, atol=2e-3)
            # The others are read in products of lower precision.
            assert torch.cosine_similarity(answers.states[number], normed[index], 0) > 0.98
            assert answers.edits[key] == one.edit
            assert answers.inside[key] == (index > 0)
            assert answers.spaced[key] == loaded.tokenizer.decode([one.row.target[index]]).startswith((" ", "\n"))
            # Of several texts behind which the same is left to say, the first one's is added.
            if one.exact and int(key) not in seen:
                seen.add(int(key))
                added = tensors["delta"][0] @ keys[index, tensors["columns"][0]]
                torch.testing.assert_close(answers.values[key], added, rtol=1e-3, atol=1e-3)
    assert next(found, None) is None


def test_states_inside_prompts_are_those_before_their_last_tokens(made: tuple[Loaded, Manifest, ReadTexts]) -> None:
    loaded, manifest, read = made
    answers, epsilon, begin = read.answers(), float(loaded.model.config.rms_norm_eps), 0
    for one in read.texts:
        states = states_of(loaded.model, manifest.site, LAYER, list(one.row.prompt))[1:-1][-12:]
        part = slice(begin, begin := begin + len(states))
        normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
        assert (torch.cosine_similarity(answers.asking[part], normed, -1) > 0.98).all()
        assert answers.asking_edit[part].tolist() == [one.edit] * len(states)
    assert begin == len(answers.asking)
