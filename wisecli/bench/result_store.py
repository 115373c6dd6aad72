"""Rows of `wise bench`, stored as they are measured, and the model, data and seed that all of them share."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wisecli.bench.json_lines import append_line, whole_lines
from wisecli.bench.result_row import ResultRow
from wisecli.errors import ChangedInputError
from wisecli.io.checkpoint import read_json, replace_json

# Where what is not finished lies, in an output.
WORK = "work"
# All that is written beside what it is about, and means nothing once that is something else.
_MADE = ("rows.jsonl", "results.*", "study-*", "report.html")


def require_same(output: Path, about: Mapping[str, Any], *, force: bool) -> None:
    """Check that the rows in a directory were measured with the same data and settings, as ``about.json`` records.

    What one run does not depend on (answers that are generated, for a study) it leaves to the others.

    Args:
        force: throw away what is about something else.

    Raises:
        ChangedInputError: they are about another model, dataset or seed.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "about.json"
    before = read_json(file) if file.is_file() else {}
    other = [name for name, now in about.items() if name in before and before[name] != now]
    if other and not force:
        raise ChangedInputError(output, [f"{name} was {before[name]}, now {about[name]}" for name in other])
    if other:
        for path in (path for pattern in _MADE for path in output.glob(pattern)):
            path.unlink()
        shutil.rmtree(output / WORK, ignore_errors=True)
    replace_json(file, {**({} if other else before), **about})


def kept_date(output: Path) -> str | None:
    """Return the date that chat templates were given when rows in a directory were begun; ``None`` without rows."""
    file = output / "about.json"
    found = read_json(file).get("chat_date") if file.is_file() else None
    return found if isinstance(found, str) else None


class ResultRows:
    """Rows in a file, a line each: what identifies a row, and its ``figures``."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found: dict[str, ResultRow] = {_key(row): row for row in whole_lines(file)}

    def __contains__(self, point: Mapping[str, Any]) -> bool:
        return _key(point) in self._found

    def __getitem__(self, point: Mapping[str, Any]) -> ResultRow:
        return self._found[_key(point)]

    def add(self, row: ResultRow) -> None:
        """Keep one more."""
        self._found[_key(row)] = row
        append_line(self.file, row)


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "figures"}, sort_keys=True)
