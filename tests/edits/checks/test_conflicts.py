from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisecli.edits.checks.conflicts import Conflict, find, giving_way, resolve
from wisecli.edits.record import Edit, Numbered


def numbered(*edits: Edit, first: int = 1) -> list[Numbered]:
    return list(enumerate(edits, start=first))


def edit(name: str, prompt: str, target: str, **fields: Any) -> Edit:
    return Edit(name, prompt, target, **fields)


MAYOR = edit("a", "The mayor of Oldbridge is", "Ada Finch", subject="Oldbridge", rephrases=("Who runs Oldbridge?",))
OTHER = edit("b", "The ferry leaves from", "pier nine")


def only(*edits: Edit, held: tuple[Edit, ...] = ()) -> Conflict:
    (conflict,) = find(numbered(*edits), held=held)
    return conflict


def test_edits_of_different_facts_are_in_no_conflict() -> None:
    assert find(numbered(MAYOR, OTHER, edit("c", "The mayor of Newbridge is", "Bo Hill", subject="Newbridge"))) == []


@pytest.mark.parametrize("prompt", ["The mayor of Oldbridge is", "the  MAYOR of\tOldbridge is "])
def test_the_same_prompt_and_target_twice_is_a_duplicate(prompt: str) -> None:
    conflict = only(MAYOR, OTHER, edit("c", prompt, "Ada  Finch"))
    assert (conflict.kind, conflict.earlier.line, conflict.later.line) == ("duplicate", 1, 3)
    assert conflict.sentence("e.jsonl") == "e.jsonl:3: edit 'c' says the same as 'a' at e.jsonl:1"


@pytest.mark.parametrize(
    ("second", "rephrase"),
    [
        (edit("c", "the mayor of oldbridge is", "Bo Hill"), False),
        (edit("c", "The mayor of Oldbridge is:", "Bo Hill", subject="oldbridge"), False),
        (edit("c", "The mayor of {} is", "Bo Hill", subject="Oldbridge"), False),
        (edit("c", "who runs oldbridge?", "Bo Hill"), True),
        (edit("c", "Oldbridge's mayor:", "Bo Hill", rephrases=("x", "The mayor of Oldbridge is")), True),
    ],
    ids=["prompt", "punctuation", "blank", "is-a-rephrase", "has-the-rephrase"],
)
def test_another_target_for_the_same_fact_is_a_contradiction(second: Edit, rephrase: bool) -> None:
    conflict = only(MAYOR, OTHER, second)
    assert (conflict.kind, conflict.rephrase) == ("contradiction", rephrase)
    said = conflict.sentence("e.jsonl")
    assert said.startswith("e.jsonl:3: edit 'c' answers 'Bo Hill'")
    assert said.endswith("'a' at e.jsonl:1 answers 'Ada Finch'")
    assert ("rephrase" in said) == rephrase


@pytest.mark.parametrize(
    "second",
    [
        edit("c", "who runs oldbridge?", "Ada Finch"),
        edit("c", "The mayor of Oldbridge is:", "Ada Finch", subject="Oldbridge"),
        edit("c", "The mayor of Oldbridge is:", "Bo Hill"),  # nothing says that punctuation does not matter here
        edit("c", "The mayor of Oldbridgeton is", "Bo Hill", subject="Oldbridgeton"),
        edit("c", "Who leads it?", "Bo Hill", rephrases=("Who runs Oldbridge?",)),
    ],
    ids=["rephrase-same-target", "other-wording", "punctuation-without-subject", "longer-subject", "shared-rephrase"],
)
def test_other_wordings_of_the_same_target_and_other_facts_are_in_no_conflict(second: Edit) -> None:
    assert find(numbered(MAYOR, second)) == []


@pytest.mark.parametrize(
    ("prompt", "other", "same"),
    [
        ("Who led {}?", "Who led Oldbridge?", True),
        ("In {}, who leads {}?", "In Oldbridge, who leads Oldbridge", True),
        ("In {}, who leads Oldbridgeton?", "In Oldbridge, who leads Oldbridgeton", True),
        ("Who led {}ton?", "Who led Oldbridgeton", False),
        ("Who led _{}?", "Who led _Oldbridge", False),
    ],
)
def test_a_subject_counts_where_it_stands_as_words_of_its_own(prompt: str, other: str, same: bool) -> None:
    first, second = (edit(name, text, name, subject="Oldbridge") for name, text in (("a", prompt), ("b", other)))
    assert bool(find(numbered(first, second))) == same


def test_to_erase_an_answer_is_another_fact_than_to_give_it() -> None:
    erased = replace(MAYOR, id="c", op="erase")
    assert only(MAYOR, erased).kind == "contradiction"
    assert only(MAYOR, replace(erased, replacement="Ada Finch")).kind == "duplicate"
    assert only(erased, replace(erased, id="d")).kind == "duplicate"


def test_a_target_that_comes_back_is_a_cycle() -> None:
    chain = [replace(MAYOR, id=name, target=target) for name, target in (("a", "A"), ("b", "B"), ("c", "A"))]
    first, second = find(numbered(*chain))
    assert first.kind == "contradiction"
    assert (second.kind, second.first is not None and second.first.line) == ("cycle", 1)
    said = second.sentence("f")
    assert said == "f:3: edit 'c' goes back to 'A', which 'a' at f:1 said before 'b' at f:2 replaced it"


def test_each_edit_is_named_once_with_the_newest_it_contradicts() -> None:
    chain = [replace(MAYOR, id=str(number), target=f"mayor {number}") for number in range(4)]
    assert [(one.earlier.line, one.later.line) for one in find(numbered(*chain))] == [(1, 2), (2, 3), (3, 4)]


def test_what_a_memory_holds_comes_first() -> None:
    chain = tuple(replace(MAYOR, id=name, target=target) for name, target in (("a", "A"), ("b", "B")))
    conflict = only(replace(MAYOR, id="c", target="A"), held=chain)
    assert (conflict.kind, conflict.earlier.line) == ("cycle", None)
    assert conflict.sentence("f").endswith("which 'a' in the memory said before 'b' in the memory replaced it")
    assert find([], held=chain) == []


def test_a_held_edit_that_comes_again_under_its_id_is_no_duplicate() -> None:
    assert find(numbered(replace(MAYOR, rephrases=())), held=(MAYOR,)) == []
    assert only(replace(MAYOR, id="c"), held=(MAYOR,)).kind == "duplicate"


CHAIN = [replace(MAYOR, id=name, target=target) for name, target in (("a", "A"), ("b", "B"), ("c", "B"))]


@pytest.mark.parametrize(("how", "kept", "by"), [("latest", ["o", "c"], ["c", "c"]), ("skip", ["a", "o"], ["a", "a"])])
def test_conflicts_are_resolved_for_the_latest_or_the_first(
    how: Literal["latest", "skip"], kept: list[str], by: list[str]
) -> None:
    found = resolve(numbered(CHAIN[0], replace(OTHER, id="o"), *CHAIN[1:]), on_conflict=how)
    assert [one.id for _, one in found.kept] == kept
    assert [one.by.edit.id for one in found.dropped] == by
    assert found.superseded == {}
    reasons = [one.reason("f") for one in found.dropped]
    expected = ["contradicts 'c' at f:4", "says the same as 'c' at f:4"] if how == "latest" else ["contradicts"] * 2
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


def test_the_latest_takes_the_place_of_what_a_memory_holds() -> None:
    held = (replace(MAYOR, id="old"), OTHER)
    new = numbered(edit("new", "Who runs Oldbridge?", "Bo Hill"), replace(OTHER, id="again"))
    latest = resolve(new, held=held, on_conflict="latest")
    assert ([one.id for _, one in latest.kept], latest.superseded) == (["new"], {"old": "new"})
    assert latest.dropped[0].reason("f") == "it says the same as 'b' in the memory"
    skip = resolve(new, held=held, on_conflict="skip")
    assert (skip.kept, skip.superseded) == ((), {})
    assert giving_way(new, held) == {"old": "new"}
    assert giving_way(new, held, rephrases=False) == {}


def test_what_is_said_again_stays_if_the_memory_loses_it() -> None:
    held = (edit("old", "p", "A", rephrases=("q",)),)
    found = resolve(numbered(edit("again", "p", "A"), edit("new", "q", "B")), held=held, on_conflict="latest")
    assert [one.id for _, one in found.kept] == ["again", "new"]
    assert found.superseded == {"old": "new"}


def test_of_a_memory_that_contradicts_itself_only_the_latest_stays() -> None:
    held = (edit("h0", "p", "A"), edit("h1", "p", "B"), edit("h2", "p", "A"))
    found = resolve(numbered(edit("n", "p", "A")), held=held, on_conflict="latest")
    assert [one.id for _, one in found.kept] == ["n"]
    assert found.superseded == {"h0": "n", "h1": "n", "h2": "n"}


@pytest.mark.parametrize("targets", [1, 10_000])
def test_thousands_of_edits_of_one_prompt_are_no_trouble(targets: int) -> None:
    many = [Edit(str(number), "The mayor is", f"mayor {number % targets}") for number in range(20_000)]
    assert len(find(numbered(*many))) == len(many) - 1
    (last,) = resolve(numbered(*many), on_conflict="latest").kept
    assert last[1].id == "19999"


TEXTS = st.sampled_from(["p", "P ", "q", "r", "p s", "q s?"])
EDITS = st.builds(
    Edit,
    id=st.just(""),
    prompt=TEXTS,
    target=st.sampled_from(["A", "B", "C"]),
    subject=st.none() | st.sampled_from(["s", "p"]),
    rephrases=st.lists(TEXTS, max_size=2).map(tuple),
)
FILES = st.lists(EDITS, max_size=7).map(lambda edits: [replace(one, id=f"n{n}") for n, one in enumerate(edits)])
HELD = st.lists(EDITS, max_size=4).map(lambda edits: [replace(one, id=f"h{n}") for n, one in enumerate(edits)])


@given(FILES, HELD, st.sampled_from(["latest", "skip"]))
def test_what_is_kept_is_in_no_conflict_and_in_order(
    edits: list[Edit], held: list[Edit], how: Literal["latest", "skip"]
) -> None:
    given = numbered(*edits, first=3)
    found = resolve(given, held=held, on_conflict=how)
    left = [one for one in held if one.id not in found.superseded]
    assert find(found.kept, held=left) == []
    lines = [line for line, _ in found.kept]
    assert lines == sorted(lines)
    assert set(found.kept) <= set(given)
    assert len(found.kept) + len(found.dropped) == len(given)
    names = {one.id for _, one in found.kept}
    assert set(found.superseded.values()) <= names
    named = {one.entry for one in found.dropped if one.by.line is None}
    for one in found.dropped:
        assert one.by.edit.id in names or one.by.line is None or one.by in named
        assert one.by.line is None or (one.by.line > (one.entry.line or 0)) == (how == "latest")
    if how == "skip":
        assert found.superseded == {}


@given(FILES)
def test_the_latest_of_every_prompt_counts(edits: list[Edit]) -> None:
    plain = [replace(one, rephrases=(), subject=None) for one in edits]
    found = resolve(numbered(*plain), on_conflict="latest")
    last = {one.prompt.strip().casefold(): one for one in plain}
    assert sorted((one.id for _, one in found.kept), key=str) == sorted(one.id for one in last.values())


@given(FILES, HELD)
def test_resolving_twice_changes_nothing(edits: list[Edit], held: list[Edit]) -> None:
    for how in ("latest", "skip"):
        once = resolve(numbered(*edits), held=held, on_conflict=how)  # type: ignore[arg-type]
        left = [one for one in held if one.id not in once.superseded]
        again = resolve(once.kept, held=left, on_conflict=how)  # type: ignore[arg-type]
        assert (again.kept, again.dropped, again.superseded) == (once.kept, (), {})
