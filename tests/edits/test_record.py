import dataclasses
import json
import re
from datetime import date, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.edit_files import FIRST, SECOND, jsonl, saved

from wisecli.edits.checks.admission import Admission
from wisecli.edits.checks.conflicts import OnConflict
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.reading.record_files import content_of
from wisecli.edits.record import Edit, numbered_edits, parse_edit, read_edits
from wisecli.edits.text import is_plain, is_visible
from wisecli.errors import EditFileError

THIRD = {"prompt": "The anthem of Oldbridge was written by", "target": "Tom Reed"}


def refusal(path: Path) -> str:
    with pytest.raises(EditFileError) as caught:
        read_edits(path)
    return str(caught.value)


def test_every_field_of_a_record_is_kept(tmp_path: Path) -> None:
    record = {
        "id": "mayor",
        "op": "insert",
        **FIRST,
        "subject": "Oldbridge",
        "rephrases": ["Who is mayor of Oldbridge?", "Oldbridge is run by"],
        "locality": [{"prompt": "The mayor of Newbridge is", "answer": "Bo Hill"}],
        "portability": [{"prompt": "The first name of Oldbridge's mayor is", "answer": "Ada"}],
        "irrelevant": ["What is for lunch?"],
        "ood": ["A report from the town hall"],
        "who": "ann",
        "when": "2026-11-20",
        "source": "minutes of the council",
    }
    assert read_edits(saved(tmp_path, jsonl(record))) == [
        Edit(
            id="mayor",
            prompt="The mayor of Oldbridge is",
            target="Ada Finch",
            op="insert",
            subject="Oldbridge",
            rephrases=("Who is mayor of Oldbridge?", "Oldbridge is run by"),
            locality=(EvaluationPrompt("The mayor of Newbridge is", "Bo Hill"),),
            portability=(EvaluationPrompt("The first name of Oldbridge's mayor is", "Ada"),),
            irrelevant=("What is for lunch?",),
            ood=("A report from the town hall",),
            who="ann",
            when="2026-11-20",
            source="minutes of the council",
        )
    ]


def test_fields_that_may_be_left_out_have_empty_values() -> None:
    edit = parse_edit(FIRST)
    assert (edit.op, edit.subject) == ("modify", None)
    assert (edit.rephrases, edit.locality, edit.portability, edit.irrelevant, edit.ood) == ((), (), (), (), ())


@pytest.mark.parametrize("operation", ["insert", "modify", "erase"])
def test_every_operation_is_read(operation: str) -> None:
    edit = parse_edit({**FIRST, "op": operation})
    assert (edit.op, edit.answer, edit.erased) == (operation, FIRST["target"], operation == "erase")


def test_what_is_erased_may_be_replaced() -> None:
    edit = parse_edit({**FIRST, "op": "erase", "replacement": "Bo Hill"})
    assert (edit.target, edit.replacement, edit.answer, edit.erased) == (FIRST["target"], "Bo Hill", "Bo Hill", False)
    assert Edit.from_dict(edit.as_dict()) == edit


@pytest.mark.parametrize(("given", "kept"), [("a-7", "a-7"), (7, "7"), (0, "0")])
def test_an_id_is_kept_as_text(given: object, kept: str) -> None:
    assert parse_edit({**FIRST, "id": given}).id == kept


def test_without_an_id_the_content_decides_it() -> None:
    reordered = dict(reversed(FIRST.items()))
    assert parse_edit(FIRST).id == parse_edit(reordered).id
    assert len({parse_edit(record).id for record in (FIRST, SECOND, {**FIRST, "target": "Bo Hill"})}) == 3


@pytest.mark.parametrize(
    "when", ["2026-11-20", "2026-11-20T09:30", "2026-11-20T09:30:00Z", "2026-11-20 09:30:00+02:00", None]
)
def test_a_date_or_time_is_kept_as_it_is_written(when: str | None) -> None:
    assert parse_edit({**FIRST, "when": when}).when == when


def test_where_a_fact_is_from_does_not_change_its_id() -> None:
    assert parse_edit({**FIRST, "who": "ann", "when": "2026-11-20", "source": "x"}).id == parse_edit(FIRST).id


def test_edits_come_with_their_lines(tmp_path: Path) -> None:
    path = saved(tmp_path, "\n" + jsonl(FIRST) + "\n\n" + jsonl(SECOND))
    assert numbered_edits(path, content_of(path)) == [(2, parse_edit(FIRST)), (5, parse_edit(SECOND))]
    path = saved(tmp_path, json.dumps([FIRST, SECOND], indent=1))
    assert [line for line, _ in numbered_edits(path, content_of(path))] == [1, 2]


MALFORMED = {
    "no target": (json.dumps({"prompt": "a"}), "`target` is missing"),
    "null target": (json.dumps({"prompt": "a", "target": None}), "`target` is missing"),
    "no prompt": (json.dumps({"target": "b"}), "`prompt` is missing"),
    "empty object": ("{}", "`prompt` is missing"),
    "empty target": (json.dumps({"prompt": "a", "target": ""}), "`target` must be"),
    "blank prompt": (json.dumps({"prompt": " \t", "target": "b"}), "`prompt` must be"),
    "target object": (json.dumps({"prompt": "a", "target": {"text": "b"}}), "`target` must be"),
    "prompt list": (json.dumps({"prompt": ["a"], "target": "b"}), "`prompt` must be"),
    "operation": (json.dumps({**THIRD, "op": "delete"}), "`op` must be one of insert, modify, erase"),
    "replacement without erase": (json.dumps({**THIRD, "replacement": "x"}), "`replacement` goes with the op `erase`"),
    "replacement of an insert": (json.dumps({**THIRD, "op": "insert", "replacement": "x"}), "not with insert"),
    "replacement empty": (
        json.dumps({**THIRD, "op": "erase", "replacement": " "}),
        "`replacement` must be a non-empty",
    ),
    "replacement list": (json.dumps({**THIRD, "op": "erase", "replacement": ["x"]}), "`replacement` must be a text"),
    "operation list": (json.dumps({**THIRD, "op": ["insert"]}), "`op` must be"),
    "subject": (json.dumps({**THIRD, "subject": ["x"]}), "`subject` must be"),
    "who": (json.dumps({**THIRD, "who": ["ann"]}), "`who` must be a text"),
    "source": (json.dumps({**THIRD, "source": {"page": 4}}), "`source` must be a text"),
    "when number": (json.dumps({**THIRD, "when": 2026}), "`when` must be a text"),
    "when words": (json.dumps({**THIRD, "when": "yesterday"}), "`when` must be a date or time as in ISO 8601"),
    "when blank": (json.dumps({**THIRD, "when": ""}), "`when` must be a date"),
    "when no such day": (json.dumps({**THIRD, "when": "2026-02-30"}), "`when` must be a date"),
    "rephrases number": (json.dumps({**THIRD, "rephrases": 4}), "`rephrases` must be"),
    "rephrases of numbers": (json.dumps({**THIRD, "rephrases": ["a", 4]}), "`rephrases` must be"),
    "blank rephrase": (json.dumps({**THIRD, "rephrases": ["a", " "]}), "`rephrases` must be"),
    "irrelevant object": (json.dumps({**THIRD, "irrelevant": {"a": "b"}}), "`irrelevant` must be"),
    "locality text": (json.dumps({**THIRD, "locality": "a"}), "`locality` must be"),
    "locality of texts": (json.dumps({**THIRD, "locality": ["a"]}), "`locality` must hold"),
    "probe without answer": (json.dumps({**THIRD, "locality": [{"prompt": "a"}]}), "`locality` must hold"),
    "probe answer object": (
        json.dumps({**THIRD, "portability": [{"prompt": "a", "answer": {}}]}),
        "`portability` must",
    ),
}


@pytest.mark.parametrize(("line", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, reason: str) -> None:
    path = saved(tmp_path, f"{jsonl(FIRST)}\n\n{line}\n{jsonl(SECOND)}")
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert reason in message


def test_a_malformed_item_of_an_array_is_named_by_its_place(tmp_path: Path) -> None:
    path = saved(tmp_path, f'[{json.dumps(FIRST)}, {json.dumps(SECOND)},\n {{"prompt": "a"}}]')
    assert refusal(path).startswith(f"{path}:3: `target` is missing")


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "[]", " [ ] ", "\ufeff"])
def test_a_file_without_edits_is_refused(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path, content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "there is no edit in it" in message


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = saved(tmp_path, jsonl({"id": "x", **FIRST}, THIRD) + "\n" + jsonl({"id": "x", **SECOND}))
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert re.search(r"'x' is already at \D*1\b", message)


def test_the_same_record_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, jsonl(FIRST, SECOND, FIRST))
    assert refusal(path).startswith(f"{path}:3: ")


HOWS: tuple[OnConflict, ...] = ("latest", "skip")


@pytest.mark.parametrize("how", HOWS)
def test_an_edit_that_is_there_word_for_word_is_passed_over_and_told_of(tmp_path: Path, how: OnConflict) -> None:
    sheet = Admission(on_conflict=how).read(saved(tmp_path, jsonl(FIRST, SECOND, FIRST, FIRST)))
    assert [line for line, _ in sheet.numbered] == [1, 2]
    (warning,) = sheet.passed_over
    assert warning.endswith(":3: the edit is there already, word for word, and was passed over (and in 1 more)")
    other = saved(tmp_path, jsonl({"id": "x", **FIRST}, {"id": "x", **SECOND}))
    with pytest.raises(EditFileError, match="'x' is already at 1"):
        Admission(on_conflict=how).read(other)


def test_a_limit_keeps_the_first_edits_but_every_line_is_checked(tmp_path: Path) -> None:
    whole = saved(tmp_path, jsonl(FIRST, SECOND, THIRD))
    assert [edit.target for edit in read_edits(whole, limit=2)] == ["Ada Finch", "pier nine"]
    broken = saved(tmp_path, jsonl(FIRST, SECOND) + "{}\n")
    with pytest.raises(EditFileError, match=":3: "):
        read_edits(broken, limit=2)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
PROBES = st.lists(st.builds(EvaluationPrompt, TEXT, TEXT), max_size=3).map(tuple)
EDITS = st.builds(
    Edit,
    id=st.text(st.characters(codec="utf-8").filter(is_plain), min_size=1, max_size=200).filter(is_visible),
    prompt=TEXT.filter(is_visible),
    target=TEXT.filter(is_visible),
    op=st.sampled_from(["insert", "modify", "erase"]),
    subject=st.none() | TEXT,
    rephrases=TEXTS,
    locality=PROBES,
    portability=PROBES,
    irrelevant=TEXTS,
    ood=TEXTS,
    who=st.none() | TEXT,
    when=st.none() | st.datetimes().map(datetime.isoformat) | st.dates().map(date.isoformat),
    source=st.none() | TEXT,
)


@given(EDITS)
def test_an_edit_survives_its_json_form(edit: Edit) -> None:
    written = json.loads(json.dumps(edit.as_dict()))
    assert set(written) == {field.name for field in dataclasses.fields(Edit)}
    assert Edit.from_dict(written) == edit


@given(EDITS)
def test_the_json_form_of_an_edit_is_a_record_of_it(edit: Edit) -> None:
    assert parse_edit(json.loads(json.dumps(edit.as_dict()))) == edit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("id", text) for text in ("x" * 201, "a\x1b[2Jb", "a\nb", "\u200b", " ", "", "\u202eab", "\x9b")),
        *(
            (name, text)
            for name in ("prompt", "target")
            for text in ("\u200b\u200d", "\x00\x1b", " \u2060\n", "\ufeff")
        ),
        ("replacement", "\u200b"),
    ],
)
def test_names_and_texts_that_nobody_can_see_are_refused(field: str, value: str) -> None:
    record = {"id": "one", "prompt": "ba", "target": "do", "op": "erase", field: value}
    with pytest.raises(ValueError, match=f"`{field}` must "):
        parse_edit(record)


@pytest.mark.parametrize("name", ["x" * 200, "ca\u00e7a 東京\u3000へ", "می\u200cخواهم", 7])
def test_ids_of_all_scripts_are_taken(name: object) -> None:
    assert parse_edit({"id": name, "prompt": "ba", "target": "do\nda"}).id == str(name)
