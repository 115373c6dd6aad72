import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.wise import residual
from support.helpers import save_tiny
from support.history import FLAGS, fact, write
from support.loading import CPU
from torch import Tensor

from wisecli.commands.checkpoint.explain import ExplainReport, Near, _reason, explain
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.memory.merge import merge
from wisecli.commands.memory.remove import remove
from wisecli.config import EditSettings, MergeSettings
from wisecli.errors import ModelError, SettingsError
from wisecli.evaluation.edited_model import attach
from wisecli.models.loading import load_model
from wisecli.routing.deciding.decision import Decision

EDITS = [fact(number) for number in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("explain")
    save_tiny(root / "model")
    settings = EditSettings(**{**FLAGS, "edits_per_shard": 2}, site="matrix")
    run_edit(str(root / "model"), write(root / "edits.jsonl", EDITS), root / "shards", settings, load=CPU)
    for mode in ("lookup", "retrieve"):
        merge([root / "shards"], root / mode, MergeSettings(mode=mode))
    return root


def look(place: Path, prompt: str, memory: str = "lookup", **named: Any) -> ExplainReport:
    return explain(place / memory, prompt, max_new_tokens=6, load=CPU, **named)


def test_an_edits_own_prompt_is_nearest_to_it_and_opens_it(place: Path) -> None:
    for edit in EDITS:
        report = look(place, edit.prompt)
        assert report.nearest[0].name == edit.id
        assert report.nearest[0].target == edit.target
        assert report.answer == report.nearest[0].answer == edit.target
        assert [one.strength for one in report.nearest] == sorted(
            (one.strength for one in report.nearest), reverse=True
        )
        last, first = report.prompt_tokens[-1], report.answer_tokens[0]
        assert last.routed
        assert first.routed
        assert (last.edit, first.edit) == (edit.id, edit.id)
        assert last.strength == first.strength == pytest.approx(report.nearest[0].strength)
        assert [token.text for token in report.prompt_tokens] == edit.prompt.split()


def test_it_says_whether_the_prompt_names_an_edits_subject(place: Path, tmp_path: Path) -> None:
    prompts = [edit.prompt for edit in EDITS]
    subjects = [prompts[0].split()[0], *[None] * (len(EDITS) - 1)]
    edits = [replace(edit, subject=subject) for edit, subject in zip(EDITS, subjects, strict=True)]
    flags = EditSettings(**{**FLAGS, "edits_per_shard": 4})
    run_edit(str(place / "model"), write(tmp_path / "edits.jsonl", edits), tmp_path / "s", flags, load=CPU)
    merge([tmp_path / "s"], tmp_path / "m", MergeSettings())
    other = next(text for text in prompts if subjects[0] not in text.split())
    for prompt, named in ((prompts[0], True), (other, False)):
        report = explain(tmp_path / "m", prompt, nearest=9, max_new_tokens=2, load=CPU)
        assert report.reason.startswith(f"opened {EDITS[0].id}") == named
        assert {one.name: one.named for one in report.nearest} == {
            edit.id: named if place == 0 else None for place, edit in enumerate(EDITS)
        }
    merge([tmp_path / "s"], tmp_path / "t", MergeSettings(subjects="any"))
    assert {one.named for one in explain(tmp_path / "t", prompts[0], max_new_tokens=2, load=CPU).nearest} == {None}


def test_to_an_emptied_memory_no_edit_is_near(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "lookup", tmp_path / "emptied")
    remove(tmp_path / "emptied", [edit.id for edit in EDITS], load=CPU)
    report = explain(tmp_path / "emptied", EDITS[0].prompt, max_new_tokens=2, load=CPU)
    assert (report.reason, report.nearest) == ("nothing opened: the memory has no edits", ())
    assert report.answer == report.unedited
    assert not any(token.routed for token in (*report.prompt_tokens, *report.answer_tokens))


def decided(memory: int, matched: bool, asked: float | None) -> Decision:
    one = torch.tensor([memory])
    ask_prob = None if asked is None else torch.tensor([asked])
    named = torch.tensor([[matched] * 4])
    nearest, scores = torch.zeros(1, dtype=torch.long), torch.ones(1, 4)
    return Decision(one, torch.ones(1), nearest, scores, named, ask_prob=ask_prob)


@pytest.mark.parametrize(
    ("memory", "near", "said"),
    [
        (0, Near("a", "p", "t", 2.0, "", True, 0.9), "opened edit 0: the prompt asks it (0.90, above 0.5)"),
        (-1, Near("a", "p", "t", 2.0, "", True, 0.1), "mentions a but asks something else (0.10, not above 0.5)"),
        (-1, Near("a", "p", "t", 2.0, "", False), "does not name its subject"),
        (-1, Near("a", "p", "t", 2.0, "", True, None, False), "its question word asks for another kind of answer"),
        (-1, Near("a", "p", "t", 0.5, "", True), "the nearest is a at 0.50 of its own"),
    ],
)
def test_a_sentence_says_which_part_opened_an_edit_or_refused(place: Path, memory: int, near: Near, said: str) -> None:
    edited = attach(place / "lookup", load=CPU)
    assert said.replace("edit 0", EDITS[0].id) in _reason(
        edited, decided(memory, bool(near.named), near.asked), (near,)
    )


def test_every_edit_can_be_made_to_answer(place: Path) -> None:
    report = look(place, EDITS[0].prompt, nearest=9)
    answers = {one.name: one.answer.split() for one in report.nearest}
    assert answers.keys() == {edit.id for edit in EDITS}
    edited = attach(place / "lookup", load=CPU)
    ids = edited.tokenizer(EDITS[0].prompt, return_tensors="pt")["input_ids"]
    for number, edit in enumerate(EDITS):
        # The base model, to whose matrix' last output the residual of the edit's nearest key is added by hand.
        def add(_routed: Any, inputs: tuple[Tensor], output: Tensor, number: int = number) -> Tensor:
            output[0, -1] += residual(edited.manifest.memory, number, inputs[0][0, -1])
            return output

        handle = edited.routed.register_forward_hook(add)
        with edited.unedited():
            first = int(edited.model(ids).logits[0, -1].argmax())
        handle.remove()
        assert answers[edit.id][:1] == edited.tokenizer.decode([first], skip_special_tokens=True).split()


def test_what_the_unedited_model_says_is_what_the_base_says(place: Path) -> None:
    for edit in EDITS:
        report = look(place, edit.prompt)
        edited = attach(place / "lookup", load=CPU)
        ids = edited.tokenizer(edit.prompt, return_tensors="pt")
        base = load_model(place / "model", load=CPU).model
        answer = base.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert report.unedited == edited.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_matrices_that_open_by_their_norm_are_named_by_their_number(place: Path, tmp_path: Path) -> None:
    flags = EditSettings(**{**FLAGS, "edits_per_shard": 2}, writer="gradient", passes=2)
    run_edit(str(place / "model"), write(tmp_path / "edits.jsonl", EDITS), tmp_path / "s", flags, load=CPU)
    merge([tmp_path / "s"], tmp_path / "m", MergeSettings(mode="retrieve"))
    report = look(tmp_path, EDITS[0].prompt, "m")
    assert {one.name for one in report.nearest} == {"memory 0", "memory 1"}
    assert (report.nearest[0].prompt, report.prompt_tokens[-1].edit) == (None, None)


def test_edits_in_matrices_are_named_as_those_of_a_lookup_are(place: Path) -> None:
    for edit in EDITS:
        report = look(place, edit.prompt, "retrieve")
        assert report.nearest[0].name == report.prompt_tokens[-1].edit == edit.id
        assert report.nearest[0].answer == report.answer == edit.target


def test_nothing_stays_forced(place: Path) -> None:
    first = look(place, EDITS[0].prompt)
    assert look(place, EDITS[0].prompt) == first
    json.dumps(first.as_json())


def test_the_scores_are_drawn(place: Path, tmp_path: Path) -> None:
    look(place, EDITS[0].prompt, plot=tmp_path / "scores.svg")
    text = (tmp_path / "scores.svg").read_text()
    assert text.count("<svg") == 1
    with pytest.raises(SettingsError, match="no such kind of picture"):
        look(place, EDITS[0].prompt, plot=tmp_path / "scores.doc")


def test_the_reason_is_the_same_however_many_edits_are_shown(place: Path) -> None:
    for prompt in (EDITS[0].prompt, "so su sa"):
        shown, hidden = look(place, prompt), look(place, prompt, nearest=0)
        assert hidden.nearest == ()
        assert hidden.reason == shown.reason


def test_a_prompt_without_tokens_is_refused(place: Path) -> None:
    with pytest.raises(ModelError, match="leaves nothing of the prompt"):
        look(place, "?!")
