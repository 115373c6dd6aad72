"""Answers that are looked for, and those that cannot have changed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.helpers import save_tiny, tiny_tokenizer
from support.loading import CPU

from wisecli.evaluation.answers import Answer, Answers, Targets, answered, targets_of
from wisecli.models.loading import load_model
from wisecli.models.running.shrinking_batches import unedited_beginnings


class Told:
    """Answers that name who gave them; an edit opens for texts that begin with "ka"."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers = Answers(tiny_tokenizer(), self.unedited, self.edited, batch_size=4, opened=self.opened)

    def unedited(self, texts: Sequence[str], _targets: Targets) -> list[Answer]:
        self.asked += [("unedited", text) for text in texts]
        return [Answer("before", ended=True) for _ in texts]

    def edited(self, texts: Sequence[str], targets: Targets) -> list[Answer]:
        self.asked += [("edited", text) for text in texts]
        return [Answer("after", ended=text not in targets, cut=text in targets) for text in texts]

    def opened(self, texts: Sequence[str]) -> list[bool]:
        return [text.startswith("ka") for text in texts]


def test_what_no_edit_opens_for_is_asked_of_neither_model() -> None:
    told = Told()
    pairs = [("ka ba", "ka ba"), ("ba", "ba"), ("ba be", "bi bo")]
    both = told.answers.both(pairs, stage="test")
    assert [said and (said[0].text, said[1].text) for said in both] == [("after", "before"), None, ("after", "before")]
    assert sorted(told.asked) == [
        ("edited", "ba be"),
        ("edited", "ka ba"),
        ("unedited", "bi bo"),
        ("unedited", "ka ba"),
    ]


def test_an_answer_that_was_cut_is_not_kept() -> None:
    told = Told()
    assert told.answers.after(["ka"], stage="test", targets={"ka": ["bo"]})[0].cut
    assert not told.answers.known_after
    assert not told.answers.after(["ka"], stage="test")[0].cut
    assert not told.answers.after(["ka"], stage="test", targets={"ka": ["bo"]})[0].cut
    assert told.asked == [("edited", "ka")] * 2


def test_texts_that_are_asked_for_more_than_a_target_have_none() -> None:
    found = targets_of([("a", "x"), ("b", "y"), ("a", "z"), ("b", None)])
    assert found == {"a": {"x", "z"}}


@pytest.mark.parametrize("shared", [True, False])
def test_answers_are_cut_where_they_are_no_target_any_more(tmp_path: Path, shared: bool) -> None:
    loaded = load_model(save_tiny(tmp_path / "model"), load=CPU)
    texts = ["ba be", "ka", "ma me mi mo mu", "da do"]

    def said(targets: Targets) -> list[Answer]:
        begun = unedited_beginnings(loaded.model) if shared else None
        return answered(loaded.model, loaded.tokenizer, texts, targets, max_new_tokens=8, beginnings=begun)

    whole = said({})
    assert not any(answer.cut for answer in whole)
    words = [answer.text.split() for answer in whole]
    # In another case, with other marks, and one of several is enough.
    assert said({text: ["no", f" {answer.text.upper()}."] for text, answer in zip(texts, whole, strict=True)}) == whole
    assert said({texts[0]: [" ".join([*words[0], "more"])]}) == whole
    found = said({texts[0]: [" ".join(words[0][:2])], texts[1]: ["no"]})
    assert found[2:] == whole[2:]
    assert [answer.text.split() for answer in found[:2]] == [words[0][:3], words[1][:1]]
    assert all(answer.cut and not answer.ended for answer in found[:2])
