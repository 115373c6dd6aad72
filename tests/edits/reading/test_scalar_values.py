"""Answers that are no texts: what a spreadsheet, a database or a careless script writes."""

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.ready import Ready
from support.tiny_models import Wise

from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import read_edits


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("6118", "6118"),
        ("-4", "-4"),
        ("3.50", "3.50"),
        ("1e3", "1e3"),
        ("12345678901234567890", "12345678901234567890"),
        ("true", "true"),
        ("false", "false"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_a_number_is_taken_as_it_is_written(tmp_path: Path, written: str, text: str, *, array: bool) -> None:
    """Edits out of databases: ports, years, prices and flags come as numbers and truth values."""
    path = tmp_path / "edits.json"
    record = f'{{"prompt": "The port is", "target": {written}}}'
    path.write_text(f"[{record}]" if array else record)
    assert [edit.target for edit in read_edits(path)] == [text]


def test_numbers_are_texts_wherever_an_answer_or_a_name_stands(tmp_path: Path) -> None:
    """Edits out of databases: the same in every field that holds an answer."""
    record = {
        "prompt": "a",
        "target": 1,
        "subject": 2,
        "op": "erase",
        "replacement": 3,
        "locality": [{"prompt": "b", "answer": 4}],
        "portability": {"one_hop": {"prompt": ["c"], "ground_truth": [[5, 6]]}},
        "translations": {"de": {"prompt": "d", "target": 7}},
        "also": [{"prompt": "e", "target": 8, "subject": 9}],
    }
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(record))
    edit, also = read_edits(path)
    assert (edit.target, edit.subject, edit.replacement) == ("1", "2", "3")
    assert (edit.locality, edit.portability) == ((EvaluationPrompt("b", "4"),), (EvaluationPrompt("c", "5"),))
    assert (edit.translations[0].target, also.target, also.subject) == ("7", "8", "9")


def test_values_of_tables_are_taken_as_their_texts(tmp_path: Path) -> None:
    """Tables out of databases and data frames: columns of dates, times, numbers and truth values."""
    day, moment = date(2026, 11, 20), datetime(2026, 11, 20, 9, 30)
    path = tmp_path / "edits.parquet"
    for value, text in (
        (day, "2026-11-20"),
        (moment, "2026-11-20 09:30:00"),
        (Decimal("3.50"), "3.50"),
        (True, "true"),
    ):
        pq.write_table(
            pa.Table.from_pylist([{"prompt": "It opened on", "target": value, "when": day, "seen": day}]), path
        )
        (edit,) = read_edits(path)
        assert (edit.target, edit.when) == (text, "2026-11-20")


@pytest.mark.parametrize("written", ["NaN", "Infinity", "[1]", "{}", "null", '""'])
def test_what_has_no_text_is_refused(tmp_path: Path, wise: Wise, ready: Ready, written: str) -> None:
    """Data frames: a missing number is written as NaN, and is no answer."""
    path = tmp_path / "edits.jsonl"
    path.write_text(f'{{"prompt": "The port is", "target": {written}}}')
    outcome = wise("edit", ready.model, str(path), "--dry-run")
    assert (outcome.code, f"{path}:1: `target` " in outcome.err) == (2, True)


def test_it_is_said_once_a_field(wise: Wise, ready: Ready) -> None:
    """Edits out of databases: what was taken for a text is said, with the first line and how often."""
    lines = [{"prompt": "ba be", "target": 6118}, {"prompt": "ka", "target": "fa"}, {"prompt": "ta", "target": True}]
    lines = [{"subject": line["prompt"], **line} for line in lines]
    Path("edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = wise("edit", ready.model, "edits.jsonl", "--dry-run")
    said = "edits.jsonl:1: `target` is the number 6118, taken as the text '6118' (and in 1 more)"
    assert outcome.err.splitlines() == [f"warning: {said}"]
