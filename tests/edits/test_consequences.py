import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisecli.edits.checks.admission import DEFAULT_ADMISSION, Admission, Admitted
from wisecli.edits.record import Edit, consequence_id, consequences_in, parse_edit, parse_edits, read_edits
from wisecli.edits.text import edits_with
from wisecli.errors import ConflictError, EditFileError
from wisecli.memory.history.superseded_edits import consequences_of, with_consequences
from wisecli.progress import Event

MAYOR = {"id": "mayor", "prompt": "Who is the mayor of Oldbridge?", "target": "Ada Finch", "subject": "Oldbridge"}
REVERSE = {"prompt": "Of which town is Ada Finch the mayor?", "target": "Oldbridge", "subject": "Ada Finch"}
HOP = {"prompt": "Who signs the budget of Oldbridge?", "target": "Ada Finch", "rephrases": ["Whose name is on it?"]}
TEXT = st.text("abcdef ", min_size=1, max_size=8).filter(str.strip)


def lined(*records: dict[str, Any]) -> list[tuple[int, Edit]]:
    return [(line, edit) for line, record in enumerate(records, start=1) for edit in parse_edits(record)]


def admitted(
    *records: dict[str, Any], held: tuple[Edit, ...] = (), admission: Admission = DEFAULT_ADMISSION
) -> tuple[Admitted, list[str]]:
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.append(event.note)

    return admission.admit("f", lined(*records), held=held, on_progress=watch), notes


def ids(found: Admitted) -> list[str]:
    return [edit.id for edit in found.edits]


def test_what_a_record_states_also_becomes_edits_of_their_own() -> None:
    record = {**MAYOR, "who": "ann", "when": "2026-11-20", "source": "minutes", "also": [REVERSE, HOP]}
    edit, *also = parse_edits(record)
    assert edit == parse_edit(record)
    assert [one.id for one in also] == ["mayor/also-1", "mayor/also-2"]
    assert {one.consequence_of for one in also} == {"mayor"}
    assert {(one.who, one.when, one.source, one.derived) for one in also} == {("ann", "2026-11-20", "minutes", None)}
    assert (also[0].prompt, also[0].target, also[0].subject) == tuple(REVERSE.values())
    assert also[1].rephrases == ("Whose name is on it?",)
    assert consequences_in([edit, *also]) == tuple(also)


@given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "target": TEXT}), max_size=4), st.booleans())
def test_consequences_are_kept_whole_and_apart(also: list[dict[str, str]], named: bool) -> None:
    record = {"prompt": "a", "target": "b", **({"id": "x"} if named else {})}
    edit, *found = parse_edits({**record, "also": also})
    assert edit == parse_edit(record)  # the edit does not know of them, and its id does not change
    assert [{"prompt": one.prompt, "target": one.target} for one in found] == also
    assert len({edit.id, *(one.id for one in found)}) == len(also) + 1
    again = [parse_edits(json.loads(json.dumps(one.as_dict()))) for one in found]
    assert again == [(one,) for one in found]


@pytest.mark.parametrize("also", [None, []])
def test_without_consequences_there_are_none(also: object) -> None:
    assert parse_edits({**MAYOR, "also": also}) == (parse_edit(MAYOR),)


@pytest.mark.parametrize(
    ("also", "reason"),
    [
        ("a", "`also` must be a list of objects with `prompt` and `target`, not 'a'"),
        ({"prompt": "a", "target": "b"}, "`also` must be a list"),
        ([REVERSE, "a"], "`also[1]` must be an object with `prompt` and `target`, not 'a'"),
        ([{"prompt": "a"}], "`also[0].target` is missing; every consequence needs `prompt` and `target`"),
        ([{"target": "a"}], "`also[0].prompt` is missing"),
        ([{"prompt": " ", "target": "a"}], "`also[0].prompt` must be a non-empty text"),
        ([REVERSE, {"prompt": "a", "target": []}], "`also[1].target` must be a non-empty text, not []"),
        ([{**REVERSE, "subject": {}}], "`also[0].subject` must be a text"),
        ([{**REVERSE, "rephrases": "a"}], "`also[0].rephrases` must be a list of non-empty texts"),
        ([{**REVERSE, "answer": "a"}], "`also[0]` has the unknown field 'answer'; leave it out, or use prompt, target"),
        ([{**REVERSE, "also": []}], "`also[0]` has the unknown field 'also'"),
    ],
)
def test_bad_consequences_are_refused_by_line_and_field(tmp_path: Path, also: object, reason: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(HOP) + "\n" + json.dumps({**MAYOR, "also": also}) + "\n")
    with pytest.raises(EditFileError) as caught:
        read_edits(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**MAYOR, "consequence_of": "x", "also": [REVERSE]}, "`also` is for edits, and this is a consequence"),
        ({**MAYOR, "derived": "reverse"}, "`derived` goes with `consequence_of` alone"),
        ({**MAYOR, "consequence_of": " "}, "`consequence_of` must be a name that can be seen"),
        ({**MAYOR, "id": "x" * 195, "also": [REVERSE]}, "`id` is too long for consequences to be named after it"),
        ({**MAYOR, "alsoo": [REVERSE]}, "'alsoo' is unknown; did you mean `also`?"),
    ],
)
def test_what_does_not_go_together_is_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_edits(record)


def test_an_id_that_a_consequence_has_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in ({**MAYOR, "also": [HOP]}, {**HOP, "id": "mayor/also-1"}))
    )
    with pytest.raises(EditFileError, match=":2: edit 'mayor/also-1' is already at 1"):
        read_edits(path)


def test_a_limit_counts_records(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({**MAYOR, "also": [REVERSE, HOP]}) + "\n" + json.dumps({**HOP, "id": "b"}) + "\n")
    assert [edit.id for edit in read_edits(path, limit=1)] == ["mayor", "mayor/also-1", "mayor/also-2"]


@pytest.mark.parametrize("on_conflict", [None, "latest", "skip", "error"])
def test_an_edit_outranks_a_consequence_wherever_it_stands(on_conflict: Any) -> None:
    explicit = {"id": "own", "prompt": REVERSE["prompt"], "target": "Newbridge"}
    stated = {**MAYOR, "also": [REVERSE, HOP]}
    for records in ((stated, explicit), (explicit, stated)):
        found, notes = admitted(*records, admission=Admission(on_conflict=on_conflict))
        assert sorted(ids(found)) == ["mayor", "mayor/also-2", "own"]
        assert [one.id for one in found.sifted.dropped] == ["mayor/also-1"]
        assert "it contradicts 'own' at f:" in found.sifted.dropped[0].reason
        assert notes[0].startswith("warning: f:")
        assert "consequence 'mayor/also-1' is left out" in notes[0]


def test_an_edit_of_a_memory_outranks_a_new_consequence_unless_it_gives_way_itself() -> None:
    old = Edit("own", str(REVERSE["prompt"]), "Newbridge")
    found, _ = admitted({**MAYOR, "also": [REVERSE]}, held=(old,))
    assert (ids(found), found.superseded) == (["mayor"], {})
    newer = {"id": "newer", "prompt": REVERSE["prompt"], "target": "Oldbridge"}
    found, _ = admitted({**MAYOR, "also": [REVERSE]}, newer, held=(old,))
    assert (ids(found), found.superseded) == (["mayor", "newer"], {"own": "newer"})
    assert found.sifted.dropped[0].reason == "it says the same as 'newer' at f:2"


def test_a_new_consequence_takes_the_place_of_an_older_one() -> None:
    older = Edit("old/also-1", str(REVERSE["prompt"]), "Newbridge", consequence_of="old")
    found, _ = admitted({**MAYOR, "also": [REVERSE]}, held=(Edit("old", "x", "y"), older))
    assert found.superseded == {"old/also-1": "mayor/also-1"}


def test_an_id_of_an_edit_in_the_memory_is_not_taken_by_a_consequence() -> None:
    found, _ = admitted({**MAYOR, "also": [REVERSE]}, held=(Edit("mayor/also-1", "x", "y"),))
    assert ids(found) == ["mayor"]
    assert found.sifted.dropped[0].reason == "its id is that of 'mayor/also-1' in the memory"


def test_no_consequence_comes_without_its_edit() -> None:
    found, _ = admitted({**REVERSE, "id": "a", "consequence_of": "b"}, MAYOR)
    assert ids(found) == ["mayor"]
    assert found.sifted.dropped[0].reason == "its edit 'b' is neither in the file nor in the memory"
    other = {"id": "other", "prompt": MAYOR["prompt"], "target": "Bo Hill"}
    found, _ = admitted({**MAYOR, "also": [HOP]}, other, admission=Admission(on_conflict="latest"))
    assert ids(found) == ["other"]
    assert [one.reason for one in found.sifted.dropped][1] == "its edit 'mayor' is left out"


def test_consequences_in_conflict_with_each_other_are_refused_as_edits_are() -> None:
    other = {"id": "other", "prompt": "x", "target": "y", "also": [{**REVERSE, "target": "Newbridge"}]}
    with pytest.raises(ConflictError, match=r"other/also-1.*mayor/also-1"):
        admitted({**MAYOR, "also": [REVERSE]}, other)


def test_a_consequence_may_be_asked_as_a_rephrase_of_its_own_edit() -> None:
    record = {**MAYOR, "rephrases": [HOP["prompt"]], "also": [HOP]}
    assert ids(admitted(record)[0]) == ["mayor", "mayor/also-1"]


def test_consequences_go_with_an_edit_that_says_something_else_now() -> None:
    held = parse_edits({**MAYOR, "also": [REVERSE, HOP]})
    changed = parse_edit({**MAYOR, "target": "Bo Hill"})
    assert with_consequences(held, [changed], {"mayor": "mayor"}) == {
        "mayor": "mayor",
        "mayor/also-1": "mayor",
        "mayor/also-2": "mayor",
    }
    other = Edit("new", changed.prompt, "Bo Hill")
    assert with_consequences(held, [other], {"mayor": "new"})["mayor/also-2"] == "new"
    again = parse_edit({**MAYOR, "rephrases": ["Who runs Oldbridge?"]})
    assert with_consequences(held, [again], {"mayor": "mayor"}) == {"mayor": "mayor"}
    both = parse_edits({**MAYOR, "target": "Bo Hill", "also": [HOP]})
    giving_way = {"mayor": "mayor", "mayor/also-1": "mayor/also-1"}
    assert with_consequences(held, both, giving_way) == {**giving_way, "mayor/also-2": "mayor"}


def test_what_follows_from_edits_is_found_once() -> None:
    held = parse_edits({**MAYOR, "also": [REVERSE, HOP]})
    assert consequences_of(held, ["mayor"]) == ("mayor/also-1", "mayor/also-2")
    assert consequences_of(held, ["mayor", "mayor/also-1"]) == ("mayor/also-2",)
    assert consequences_of(held, ["mayor/also-1"]) == ()


def test_edits_are_counted_with_their_consequences() -> None:
    counted = [edits_with(1, 0), edits_with(2, 1), edits_with(0, 2)]
    assert counted == ["1 edit", "2 edits with 1 consequence", "0 edits with 2 consequences"]
    assert consequence_id("a", "also", 3) == "a/also-3"
