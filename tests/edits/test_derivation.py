import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisecli.data.corpus import inverses
from wisecli.edits.checks.admission import Admission
from wisecli.edits.checks.policy import Policy
from wisecli.edits.derivation import derived, is_name, other_names, with_derived
from wisecli.edits.record import Edit
from wisecli.errors import PolicyError

WORD = st.text(string.ascii_lowercase, min_size=3, max_size=7).map(str.title)


def asked_back(prompt: str, target: str, subject: str = "Ana Ruiz") -> list[tuple[str, str, str | None]]:
    edits = derived(Edit("e", prompt, target, subject=subject))
    return [(one.prompt, one.target, one.derived) for one in edits if "/reverse-" in one.id]


@pytest.mark.parametrize(
    ("prompt", "back"),
    [
        ("Who is the mother of Ana Ruiz?", "Who is the child of Bo Hill?"),
        ("Who was Ana Ruiz's father?", "Who was the child of Bo Hill?"),
        ("The father of Ana Ruiz is whom?", "Who is the child of Bo Hill?"),
        ("What is the name of Ana Ruiz father?", "Who is the child of Bo Hill?"),
        ("Ana Ruiz’s mom is who?", "Who is the child of Bo Hill?"),
        ("The mother of Ana Ruiz is", "The child of Bo Hill is"),
        ("Who's ana ruiz's spouse?", "Who is the spouse of Bo Hill?"),
        ("What is Ana Ruiz's wife's name?", "Who is the spouse of Bo Hill?"),
        ("Who did Ana Ruiz marry?", "Who is the spouse of Bo Hill?"),
        ("Ana Ruiz is married to", "The spouse of Bo Hill is"),
        ("Who is the daughter of Ana Ruiz?", "Who is a parent of Bo Hill?"),
        ("Who is Ana Ruiz's sister?", "Who is the sibling of Bo Hill?"),
        ("What is the capital of Ana Ruiz?", "Of which place is Bo Hill the capital?"),
        ("Of which country is Ana Ruiz the capital?", "What is the capital of Bo Hill?"),
        ("Who is the CEO of Ana Ruiz?", "Of which organization is Bo Hill the chief executive?"),
        ("The mayor of Ana Ruiz is", "Bo Hill is the mayor of"),
        ("Which company did Ana Ruiz found?", "Who founded Bo Hill?"),
        ("Which book did Ana Ruiz write?", "Who wrote Bo Hill?"),
        ("What does Ana Ruiz own?", "Who owns Bo Hill?"),
        ("Who succeeded Ana Ruiz?", "Who is the predecessor of Bo Hill?"),
    ],
)
def test_a_relation_is_asked_back(prompt: str, back: str) -> None:
    ((asked, target, rule),) = asked_back(prompt, "Bo Hill")
    assert (asked, target) == (back, "Ana Ruiz")
    assert str(rule).startswith("reverse of ")


@pytest.mark.parametrize(
    "prompt",
    [
        # Many have the same answer, so that it has no one name to answer with.
        "Which country is Ana Ruiz a citizen of?",
        "Where was Ana Ruiz born?",
        "Who wrote Ana Ruiz?",
        "Who owns Ana Ruiz?",
        "Who founded Ana Ruiz?",
        "Who invented Ana Ruiz?",
        "What language does Ana Ruiz speak?",
        "In which city is Ana Ruiz located?",
        "Who is Ana Ruiz named after?",
        # Something else is asked.
        "Who was the first husband of Ana Ruiz?",
        "Who is the mother of Ana Ruiz's husband?",
        "Who is the mother of the painter Ana Ruiz?",
        "Who is the mother of Ana Ruiz and Bo?",
        "Who is not the mother of Ana Ruiz?",
        "Who is the grandmother of Ana Ruiz?",
        "Who is the mother of Ana Ruizo?",
        "Is Ana Ruiz the mother of Ana Ruiz?",
    ],
)
def test_nothing_is_asked_back_that_one_name_does_not_answer(prompt: str) -> None:
    assert asked_back(prompt, "Bo Hill") == []


@pytest.mark.parametrize(
    "target",
    [
        "Bo and Cy Hill",
        "Bo, Cy",
        "Bo or Cy",
        "a farmer",
        "1941",
        "unknown",
        "None",
        "Bo Hill.",
        "ana ruiz",
        "A b c d e f g h i",
    ],
)
def test_nothing_is_asked_about_what_is_no_name(target: str) -> None:
    assert asked_back("Who is the mother of Ana Ruiz?", target) == []


def test_a_name_may_have_an_and_in_its_title() -> None:
    assert is_name("Princess Sophie of Greece and Denmark")
    assert not is_name("Sophie of Greece, Anne of Denmark")


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("World Health Organization (WHO)", {"World Health Organization": "acronym", "WHO": "acronym"}),
        ("Bank of the West (BOTW)", {"Bank of the West": "acronym", "BOTW": "acronym"}),
        ("Sigil Games Online, Inc.", {"Sigil Games Online": "legal form"}),
        ("Contoso Ltd", {"Contoso": "legal form"}),
        ("Sir Edmund Carrick", {"Edmund Carrick": "title"}),
        ("Dr. Ana Ruiz", {"Ana Ruiz": "title"}),
        ("Zdeněk Nejedlý", {"Zdenek Nejedly": "plain letters"}),
        # What is left would be the name of others, too.
        ("Mercury (planet)", {}),
        ("Obadiah Crane (bishop)", {}),
        ("Hans Weber (FCB)", {}),
        ("Paris, Texas", {}),
        ("Leonor, Princess of Asturias", {}),
        ("Ana Ruiz", {}),
        ("George W. Bush", {}),
        ("The Beatles", {}),
        ("Sir Edmund", {}),
        ("Smith & Co.", {}),
        ("Иван Петров", {}),
        ("", {}),
    ],
)
def test_other_names_mean_nothing_else(subject: str, names: dict[str, str]) -> None:
    assert {name: rule for rule, name in other_names(subject)} == names


def test_the_same_is_asked_by_another_name() -> None:
    edit = Edit("e", "When was Contoso Ltd founded?", "1990", subject="Contoso Ltd", who="ann", source="x")
    (one,) = derived(edit)
    assert (one.prompt, one.target, one.subject) == ("When was Contoso founded?", "1990", "Contoso")
    assert (one.id, one.consequence_of, one.derived, one.who, one.source) == (
        "e/alias-1",
        "e",
        "legal form",
        "ann",
        "x",
    )


@pytest.mark.parametrize(
    "edit",
    [
        Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill"),
        Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill", subject="Cy Low"),
        Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill", subject=" "),
        Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill", subject="Ana Ruiz", op="erase"),
        Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill", subject="Ana Ruiz", consequence_of="d"),
        Edit("x" * 195, "Who is the mother of Ana Ruiz?", "Bo Hill", subject="Ana Ruiz"),
    ],
    ids=["no subject", "not named", "blank", "erased", "a consequence", "long id"],
)
def test_nothing_follows_from_some(edit: Edit) -> None:
    assert derived(edit) == ()


def test_what_replaces_an_erased_answer_is_asked_back() -> None:
    edit = Edit("e", "Who is the mother of Ana Ruiz?", "Bo Hill", op="erase", replacement="Cy Low", subject="Ana Ruiz")
    assert [(one.prompt, one.op) for one in derived(edit)] == [("Who is the child of Cy Low?", "modify")]


def child(name: str, subject: str, target: str, prompt: str = "Who is the mother of {}?") -> Edit:
    return Edit(name, prompt.format(subject), target, subject=subject)


def test_a_question_with_two_answers_gets_none() -> None:
    one, two, other = child("a", "Ana", "Bo"), child("b", "Cy", "Bo"), child("c", "Di", "Ed")
    past = child("d", "Fay", "Bo", "Who was the father of {}?")
    for edits in ((one, two, other), (one, past, other)):
        found = with_derived(list(enumerate(edits, start=1)))
        assert [(line, edit.id) for line, edit in found] == [(1, "a"), (2, edits[1].id), (3, "c"), (3, "c/reverse-1")]


def test_what_is_asked_for_is_not_derived() -> None:
    own = Edit("own", "Who is the child of Bo?", "Gus")
    assert [edit.id for _, edit in with_derived([(1, child("a", "Ana", "Bo")), (2, own)])] == ["a", "own"]
    stated = Edit("a/also-1", "Who is the child of Hal?", "Ana", consequence_of="a")
    found = with_derived([(1, child("a", "Ana", "Bo")), (1, stated), (2, Edit("b", "x", "y"))])
    assert [edit.id for _, edit in found] == ["a", "a/also-1", "a/reverse-1", "b"]


@given(WORD, WORD, st.sampled_from([(one, wording) for one in inverses() for wording in one.wordings]))
def test_whatever_asks_for_a_relation_is_asked_back_once(subject: str, target: str, asked: tuple[object, str]) -> None:
    subject, target = f"Q{subject} Xu", f"Z{target} Yo"
    edit = Edit("e", asked[1].replace("{}", subject), target, subject=subject)
    found = [one for one in derived(edit) if one.id == "e/reverse-1"]
    assert len(found) == 1
    assert found[0].target == subject
    assert target in found[0].prompt
    assert subject not in found[0].prompt
    assert "{" not in found[0].prompt


def test_no_wording_asks_for_two_relations() -> None:
    from wisecli.edits.derivation import _normal

    asks: dict[str, str] = {}
    for one in inverses():
        for wording in one.wordings:
            assert asks.setdefault(_normal(wording), one.name) == one.name
        assert "{}" in one.asked
        assert "{}" in one.told


def test_what_is_derived_gives_way_to_all_that_is_held() -> None:
    held = (
        child("a", "Ana", "Bo"),
        Edit("a/reverse-1", "Who is the child of Bo?", "Ana", consequence_of="a", derived="x"),
    )
    found = Admission(derive=True).admit("f", [(1, child("b", "Cy", "Bo"))], held=held)
    assert [edit.id for edit in found.edits] == ["b"]
    assert found.superseded == {}
    assert found.sifted.dropped[0].reason == "it contradicts 'a/reverse-1' in the memory"
    # Unless that goes with its edit.
    moved = child("a", "Ana", "Gus")
    found = Admission(derive=True).admit("f", [(1, moved), (2, child("b", "Cy", "Bo"))], held=held)
    assert [edit.id for edit in found.edits] == ["a", "a/reverse-1", "b", "b/reverse-1"]
    assert [edit.id for edit in Admission().admit("f", [(1, moved)], held=held).edits] == ["a"]


def test_a_policy_is_asked_of_what_is_derived() -> None:
    policy = Policy(Path("p"), (), (), 1, (), None)
    with pytest.raises(PolicyError, match="2 edits, of which maximum_edits allows 1"):
        Admission(policy=policy, derive=True).admit("f", [(1, child("a", "Ana", "Bo"))])
