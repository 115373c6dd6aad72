import json
from pathlib import Path
from typing import Any

import pytest
from support.edit_files import FIRST, SECOND, jsonl, saved

from wisecli.edits.reading.record_files import content_of, records_of
from wisecli.errors import EditFileError


def records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return list(records_of(path, content_of(path)))


def refusal(path: Path) -> str:
    with pytest.raises(EditFileError) as caught:
        records(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        jsonl(FIRST, SECOND),
        jsonl(FIRST, SECOND).rstrip("\n"),
        "\n  \n" + jsonl(FIRST) + "\n\t\n" + jsonl(SECOND) + "\n\n",
        jsonl(FIRST, SECOND).replace("\n", "\r\n"),
        "\ufeff" + jsonl(FIRST, SECOND),
        json.dumps([FIRST, SECOND]),
        "\n  " + json.dumps([FIRST, SECOND], indent=2) + "\n",
        "\ufeff" + json.dumps([FIRST, SECOND]),
    ],
    ids=["jsonl", "no-last-newline", "blank-lines", "crlf", "bom", "array", "array-indented", "array-bom"],
)
def test_the_same_records_are_read_from_every_way_of_writing_them(tmp_path: Path, content: str) -> None:
    assert [record for _, record in records(saved(tmp_path, content))] == [FIRST, SECOND]


def test_text_is_read_as_utf8_and_only_newlines_end_a_line(tmp_path: Path) -> None:
    record = {"prompt": "Where does Zoë live?\u2028Answer:", "target": "中央 район"}
    content = json.dumps(record, ensure_ascii=False) + "\n" + jsonl(SECOND)
    assert records(saved(tmp_path, content)) == [(1, record), (2, SECOND)]


LINES = {
    "no json": "not json",
    "cut short": '{"prompt": "The mayor',
    "a number": "3",
    "null": "null",
    "a list": '["prompt", "target"]',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_object_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = saved(tmp_path, f"{jsonl(FIRST)}\n\n{line}\n{jsonl(SECOND)}")
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert "write one JSON object" in message


def test_an_item_of_an_array_that_is_no_object_is_named_by_its_place(tmp_path: Path) -> None:
    path = saved(tmp_path, f'[{json.dumps(FIRST)}, {json.dumps(SECOND)},\n "a"]')
    assert refusal(path).startswith(f"{path}:3: an item of the array is no JSON object")


def test_an_unclosed_array_is_named_by_the_line_where_it_breaks_off(tmp_path: Path) -> None:
    path = saved(tmp_path, f"[\n{json.dumps(FIRST)},\n{json.dumps(SECOND)}\n")
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert "not a JSON array" in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jsonl"
    assert refusal(path) == f"{path}: no such file; check the path"


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", '{"prompt": "Zoë", "target": "b"}'.encode("latin-1")])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "UTF-8" in refusal(saved(tmp_path, content))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: ")
