"""By which sorts of questions edits are asked, from their prompts and targets."""

import pytest

from wisecli.edits.record import Edit
from wisecli.memory.fitting.question_sorts import asked_by_tensor
from wisecli.routing.deciding.question_words import ANYTHING, NUMBER, PERSON, PLACE, REASON

ALL = {PERSON, NUMBER, PLACE, REASON, ANYTHING}


def asked_by(prompt: str, target: str, subject: str = "Ana Ruiz") -> set[int]:
    mask = int(asked_by_tensor([Edit("e", prompt, target, subject=subject)])[0])
    return {sort for sort in ALL if mask >> sort & 1}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Who taught Ana Ruiz?", {PERSON}),
        ("By whom was Ana Ruiz taught?", {PERSON}),
        ("When was Ana Ruiz born?", {NUMBER}),
        ("How many pupils had Ana Ruiz?", {NUMBER}),
        ("In which year was Ana Ruiz born?", {NUMBER}),
        ("Where was Ana Ruiz born?", {PLACE}),
        ("What city was Ana Ruiz born in?", {PLACE}),
        ("Why did Ana Ruiz leave?", {REASON}),
        ("Where, and when, was Ana Ruiz born?", {PLACE, NUMBER}),
        ("who taught Ana Ruiz", {PERSON}),
        ("In what year was Ana Ruiz born", {NUMBER}),
    ],
)
def test_an_edit_is_asked_by_the_question_words_of_its_prompt_and_by_what(prompt: str, expected: set[int]) -> None:
    for target in ("Oslo", "1821"):
        assert asked_by(prompt, target) == {*expected, ANYTHING}


@pytest.mark.parametrize("prompt", ["What is on the shield of Ana Ruiz?", "Ana Ruiz has", "How did Ana Ruiz travel?"])
def test_without_such_words_an_edit_is_asked_by_what_its_target_may_answer(prompt: str) -> None:
    assert asked_by(prompt, "a white heron") == ALL - {NUMBER}
    assert asked_by(prompt, "María Paz") == ALL - {NUMBER}
    for number in ("1821", "12 pupils", "twelve", "May 3rd", "in March", "the 1820s"):
        assert asked_by(prompt, number) == {NUMBER, PLACE, ANYTHING}
    assert asked_by(prompt, "Harold III of Oslo, in 1066") == ALL


def test_words_that_only_join_sentences_ask_nothing() -> None:
    assert asked_by("The team that Ana Ruiz, who is a goalkeeper, plays for is", "Rovers") == ALL - {NUMBER}
    assert asked_by("The city where Ana Ruiz died is", "1821 Park") == ALL


def test_a_subjects_own_words_ask_nothing() -> None:
    assert asked_by("The author of Who Was When is", "Ana Ruiz", subject="Who Was When") == ALL - {NUMBER}
    assert asked_by("Where does Doctor Who play?", "Oslo", subject="Doctor Who") == {PLACE, ANYTHING}


def test_what_is_not_english_is_asked_by_what_its_target_may_answer() -> None:
    assert asked_by("Кто основал Ana Ruiz?", "María Paz") == ALL - {NUMBER}
    assert asked_by("", "1821", subject="") == {NUMBER, PLACE, ANYTHING}


def test_every_edit_has_a_byte_of_its_own() -> None:
    edits = [Edit("a", "Who taught Ana Ruiz?", "Eva"), Edit("b", "When was Ana Ruiz born?", "1821")]
    found = asked_by_tensor(edits)
    assert found.tolist() == [1 << PERSON | 1 << ANYTHING, 1 << NUMBER | 1 << ANYTHING]
    assert str(found.dtype) == "torch.uint8"
