"""CSV and TSV → records: a first row of names, or two columns without names, prompt and target."""

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from wisecli.edits.reading.benchmark_layouts import COLUMNS
from wisecli.edits.reading.field_names import known_names
from wisecli.errors import EditFileError
from wisecli.io.json_schema import shown

# What spreadsheets put between cells; which one depends on the country.
_DELIMITERS = (",", ";", "\t")


def rows_of(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield every row as a record, with the line that it begins on; empty cells are left out.

    Raises:
        EditFileError: naming the line, if it cannot be told which column is which.
    """
    rows = _rows(path, text)
    number, first = next(rows, (0, []))
    if not number:
        return
    names = _names(path, first)
    if names is None:
        names = ["prompt", "target"]
        yield number, dict(zip(names, first, strict=True))
    for number, cells in rows:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise EditFileError(
                path,
                f"{len(cells)} cells in a table of {len(names)} columns; quote cells that hold commas",
                line=number,
            )
        yield number, {name: cell for name, cell in zip(names, cells, strict=False) if name and cell.strip()}


def _names(path: Path, first: list[str]) -> list[str] | None:
    """Return the names in the first row; None if it has two cells and no known name, and is an edit itself.

    Raises:
        EditFileError: it names nothing that is known, or one name twice.
    """
    known = known_names() | COLUMNS
    names = [name.strip().lower() if name.strip().lower() in known else name.strip() for name in first]
    if len([name for name in names if name]) < 2:
        raise EditFileError(path, "one column; a table of edits has one of prompts and one of targets", line=1)
    if not any(name in known for name in names):
        if len(names) == 2:
            return None
        raise EditFileError(
            path,
            f"it cannot be told which of {len(names)} columns is what; name them in the first row: prompt, target",
            line=1,
        )
    twice = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if twice is not None:
        raise EditFileError(path, f"two columns are called {shown(twice)}; rename or remove one", line=1)
    return names


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield rows that are not blank, with the lines that they begin on."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise EditFileError(path, f"not readable as a table ({error}); quote its cells anew", line=line) from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells
        line = reader.line_num + 1


def _delimiter(path: Path, text: str) -> str:
    """Return what stands between cells: what the first row has most of, outside of quotes."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.lstrip().split("\n", 1)[0]
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([first], delimiter=delimiter), [])))
