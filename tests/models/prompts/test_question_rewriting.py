"""Questions that are rewritten by rule."""

import random

import pytest

from wisecli.models.prompts.question_rewriting import (
    keywords,
    lowered,
    negated,
    noun_phrase,
    with_adjective,
    with_pronoun,
)


@pytest.mark.parametrize(
    ("question", "subject", "phrase", "sort"),
    [
        ("Who is the chief executive of Northwind?", "Northwind", "the chief executive of Northwind", "person"),
        ("What is the name of the mayor of Ulm?", "Ulm", "the mayor of Ulm", "thing"),
        ("The capital city of Belland is", "Belland", "the capital city of Belland", "place"),
        (
            "In which year was Margie's Travel founded?",
            "Margie's Travel",
            "the year in which Margie's Travel was founded",
            "time",
        ),
        ("Which port does the Gravel server use?", "Gravel server", "the port that the Gravel server uses", "thing"),
        ("Where did Ada Holm die?", "Ada Holm", "the place where Ada Holm died", "place"),
        ("When is the line of Contoso open?", "Contoso", "the time when the line of Contoso is open", "time"),
        ("Who wrote The Long Hill?", "The Long Hill", "the person who wrote The Long Hill", "person"),
        (
            "Which river system contains Charity Creek?",
            "Charity Creek",
            "the river system that contains Charity Creek",
            "thing",
        ),
        ("What title is held by Ada Holm?", "Ada Holm", "the title that is held by Ada Holm", "thing"),
        ("What's Ada Holm's country of birth?", "Ada Holm", "Ada Holm's country of birth", "place"),
    ],
)
def test_questions_become_noun_phrases(question: str, subject: str, phrase: str, sort: str) -> None:
    assert noun_phrase(question, subject) == (phrase, sort)


def test_where_no_rule_fits_there_is_no_noun_phrase() -> None:
    assert noun_phrase("How long can I return an item bought from Fabrikam?", "Fabrikam") is None


@pytest.mark.parametrize(
    ("question", "subject", "expected"),
    [
        ("Who is the head of Northwind?", "Northwind", "Who is not the head of Northwind?"),
        ("Where was Ada Holm born?", "Ada Holm", "Where was Ada Holm not born?"),
        ("Which port does the Gravel server use?", "Gravel server", "Which port does the Gravel server not use?"),
        ("Who wrote The Long Hill?", "The Long Hill", None),
    ],
)
def test_negation(question: str, subject: str, expected: str | None) -> None:
    assert negated(question, subject) == expected


@pytest.mark.parametrize(
    ("question", "subject", "expected"),
    [
        ("Who is the head of Northwind?", "Northwind", "Who is the head of it?"),
        ("Which port does the Gravel server use?", "Gravel server", "Which port does it use?"),
        ("What replaces the discontinued T-100 pump?", "T-100 pump", "What replaces it?"),
        ("What is Northwind's logo?", "Northwind", "What is its logo?"),
        ("Who is in charge?", "Northwind", None),
    ],
)
def test_pronouns(question: str, subject: str, expected: str | None) -> None:
    assert with_pronoun(question, subject, random.Random(0)) == expected


def test_a_person_has_one_of_three_pronouns() -> None:
    asked = {with_pronoun("Where was Ada Holm born?", "Ada Holm", random.Random(seed)) for seed in range(20)}
    assert asked == {"Where was he born?", "Where was she born?", "Where were they born?"}
    begun = {with_pronoun("Ada Holm was born in", "Ada Holm", random.Random(seed)) for seed in range(20)}
    assert begun == {"He was born in", "She was born in", "They were born in"}


@pytest.mark.parametrize(
    ("where", "expected"),
    [("asked", "port Gravel server use"), ("first", "Gravel server port use"), ("last", "port use Gravel server")],
)
def test_keywords(where: str, expected: str) -> None:
    assert keywords("Which port does the Gravel server use?", "Gravel server", where) == expected
    assert keywords("What is it?", "Gravel server", where) is None


def test_an_adjective_stands_outside_of_the_subject() -> None:
    assert (
        with_adjective("Who led the board of The Fair?", "first", "The Fair") == "Who led the first board of The Fair?"
    )
    assert with_adjective("Who led The Fair?", "first", "The Fair") is None


def test_names_keep_their_capitals() -> None:
    assert lowered("Who is it", None) == "who is it"
    assert lowered("Ada Holm was born in", "Ada Holm") == "Ada Holm was born in"
    assert lowered("NATO was founded in", None) == "NATO was founded in"
