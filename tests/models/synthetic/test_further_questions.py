"""Questions that are made of another one."""

import random

import pytest

from wisecli.data.corpus import relations
from wisecli.models.synthetic.further_questions import two_hops, yes_or_no


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Where was Ada born?", {"Was Ada born in V?", "Was Ada born at V?"}),
        ("When did the war end?", {"Did the war end in V?", "Did the war end on V?"}),
        ("Who is the mayor of Felden?", {"Is the mayor of Felden V?", "Is V the mayor of Felden?"}),
        ("Which country is Ada a citizen of?", {"Is Ada a citizen of V?"}),
        ("By whom was it built?", {"Was it built by V?"}),
        ("Who wrote the play?", {"Was it V who wrote the play?", "Is V the one who wrote the play?"}),
        ("Felden lies where?", set()),
    ],
)
def test_a_question_becomes_one_for_a_yes_or_no(question: str, wanted: set[str]) -> None:
    found = {yes_or_no(question, (), "V", random.Random(seed)) for seed in range(20)}
    assert found == (wanted or {None})


def test_a_statement_becomes_a_question_for_a_yes_or_no() -> None:
    assert (
        yes_or_no("Felden lies where?", ("The mayor of Felden is",), "V", random.Random(0))
        == "Is the mayor of Felden V?"
    )
    assert yes_or_no("Felden lies where?", ("Felden had",), "V", random.Random(0)) is None


def test_two_hops_ask_something_of_the_answer() -> None:
    asks = {text for one in relations() if one.kind in ("person", "athlete", "musician") for text in one.asks}
    for seed in range(20):
        found = two_hops(("Who is the mayor of Felden?",), "Felden", random.Random(seed))
        assert found is not None
        assert found.casefold() in {text.replace("{}", "the mayor of Felden").casefold() for text in asks}
    assert two_hops(("Felden lies where?",), "Felden", random.Random(0)) is None
