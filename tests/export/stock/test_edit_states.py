"""Texts that edits answer are read once each, as a plain pass over prompt and answer reads them."""

from dataclasses import replace

import pytest
import torch
from support.byte_level import save_base
from support.helpers import manifest_for, memory_for, states_of
from support.loading import CPU
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.edit_states import ReadTexts, read_texts
from wisecli.export.stock.text_states import StateCapture
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.progress import ignore_progress

LAYER = 2
EDITS = [
    Edit("one", "The mayor of Bravik is", "Ole", subject="Bravik"),
    Edit("two", "It is what it is", "so", subject=""),
    Edit("three", "The mayor of Bravik is", "Ta", subject="Bravik"),
]


def read_with(loaded: Loaded, manifest: Manifest) -> ReadTexts:
    return read_texts(StateCapture(loaded, manifest.site, ignore_progress, 4), manifest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Manifest, ReadTexts]:
    base = save_base(tmp_path_factory.mktemp("edits") / "base", hidden_size=64, head_dim=16)
    loaded = load_model(base, CPU)
    memory = memory_for(loaded.model, find_site(base, Checkpoint(base), LAYER))
    manifest = manifest_for(base, memory, EDITS, layer=LAYER)
    return loaded, manifest, read_with(loaded, manifest)


def test_each_text_is_read_once_and_the_last_edit_that_asks_it_answers(
    made: tuple[Loaded, Manifest, ReadTexts],
) -> None:
    _, _, read = made
    assert len(read.numbers()) == len(read.texts)
    assert {one.edit for one in read.texts if one.own} == {1, 2}
    # Of an edit without a subject only its own prompts are read.
    assert {one.edit for one in read.texts if not one.own} == {2}


@pytest.mark.parametrize("last", [False, True], ids=["edited layer", "last layer"])
def test_states_behind_both_layers_are_those_of_a_plain_pass(
    made: tuple[Loaded, Manifest, ReadTexts], last: bool
) -> None:
    loaded, manifest, read = made
    answers = read.answers(read.last if last else read.at_router)
    layer, found = len(loaded.model.model.layers) - 1 if last else LAYER, iter(range(len(answers.key)))
    for one in read.texts:
        tokens = [*one.row.prompt, *one.row.target[:-1]]
        normed = normed_of(loaded, manifest, layer, tokens)[len(one.row.prompt) - 1 :]
        for index, token in enumerate(one.row.target):
            number = next(found)
            key = answers.key[number]
            if one.exact:
                torch.testing.assert_close(answers.states[number], normed[index], rtol=1e-3, atol=2e-3)
            # The others are read in products of lower precision.
            assert torch.cosine_similarity(answers.states[number], normed[index], 0) > 0.98
            assert answers.edits[key] == one.edit
            assert answers.inside[key] == (index > 0)
            assert answers.spaced[key] == loaded.tokenizer.decode([token]).startswith((" ", "\n"))
            assert answers.then[key] == (token, None)
    assert next(found, None) is None


def test_of_an_erased_answer_its_first_tokens_are_unwanted(made: tuple[Loaded, Manifest, ReadTexts]) -> None:
    loaded, manifest, _ = made
    read = read_with(loaded, replace(manifest, edits=(replace(EDITS[1], op="erase"),)))
    row = next(one.row for one in read.texts if one.own)
    assert read.answers(read.last).then[0] == (row.target[0], row.unwanted[0])
    assert row.unwanted[0]


def normed_of(loaded: Loaded, manifest: Manifest, layer: int, tokens: list[int]) -> Tensor:
    """Normed states (T, d) that leave a layer."""
    states = states_of(loaded.model, manifest.site, layer, tokens)
    normed: Tensor = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + loaded.model.config.rms_norm_eps)
    return normed


def test_states_inside_prompts_are_those_before_their_last_tokens(made: tuple[Loaded, Manifest, ReadTexts]) -> None:
    loaded, manifest, read = made
    answers, begin = read.answers(read.at_router), 0
    for one in read.texts:
        normed = normed_of(loaded, manifest, LAYER, list(one.row.prompt))[1:-1][-12:]
        part = slice(begin, begin := begin + len(normed))
        assert (torch.cosine_similarity(answers.asking[part], normed, -1) > 0.98).all()
        assert answers.asking_edit[part].tolist() == [one.edit] * len(normed)
    assert begin == len(answers.asking)
