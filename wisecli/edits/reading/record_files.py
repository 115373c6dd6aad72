"""Files of edits → their records, each with its line: JSONL, a JSON array, or a table (Parquet, CSV, TSV)."""

import json
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from wisecli.edits.reading.csv_rows import rows_of
from wisecli.edits.reading.scalar_values import WrittenNumber
from wisecli.errors import EditFileError
from wisecli.io.json_schema import shown

# Larger files are no edits: a record takes about a kilobyte.
_LARGEST = 1 << 32


def content_of(path: Path) -> bytes:
    """Return the bytes of a file of edits.

    Raises:
        EditFileError: it is none, or cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise EditFileError(path, "not a regular file; give a file of edits")
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise EditFileError(path, f"larger than {_LARGEST} bytes; split it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise EditFileError(path, "no such file; check the path") from None
    except OSError as error:
        raise EditFileError(path, f"not readable ({error}); check the path") from None


def records_of(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every record with its line (its place in the list, for a JSON array or a table).

    Args:
        path: where the content is from; ``.parquet``, ``.csv`` and ``.tsv`` make it a table.

    Raises:
        EditFileError: naming the line where there is one, if the content is of none of these forms.
    """
    if path.suffix == ".parquet":
        yield from enumerate(_table(path, content), start=1)
        return
    text = _decoded(path, content)
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from rows_of(path, text)
        return
    if text.lstrip().startswith("["):
        yield from _array(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield number, record_in(path, number, line)


def record_in(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the record that one line of a file holds.

    Raises:
        EditFileError: naming the line, if it is no JSON object.
    """
    try:
        found = json.loads(line, object_pairs_hook=_once, parse_float=WrittenNumber)
    except json.JSONDecodeError as error:
        reason = f"invalid json: {error.msg} (column {error.colno})"
        raise EditFileError(path, f"{reason}; write one JSON object a line", line=number) from None
    except RecursionError:
        raise EditFileError(path, "nested too deeply; write one flat JSON object a line", line=number) from None
    except ValueError as error:  # a key that is there twice, a number of thousands of digits
        raise EditFileError(path, str(error), line=number) from None
    if not isinstance(found, dict):
        raise EditFileError(path, "no JSON object; write one JSON object a line", line=number)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, of which JSON would take the last of two values with the same name and lose the first.

    Raises:
        ValueError: a name is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"{shown(twice)} is there twice in one object; remove one")
    return found


def _decoded(path: Path, content: bytes) -> str:
    try:
        return TextIOWrapper(BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise EditFileError(path, f"not readable as UTF-8 text ({error}); save it as UTF-8") from None


def _table(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise EditFileError(path, "reading Parquet needs `pip install 'wisecli[parquet]'`") from None
    try:
        with ParquetFile(BytesIO(content)) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except ArrowException as error:
        raise EditFileError(path, f"not readable as Parquet ({error}); save it anew, or as JSONL") from None


def _array(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON array, numbered from 1."""
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_float=WrittenNumber)
    except json.JSONDecodeError as error:
        raise EditFileError(
            path, f"not a JSON array ({error.msg}); close it or write JSONL", line=error.lineno
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise EditFileError(path, f"not a JSON array of edits ({error})") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise EditFileError(path, "an item of the array is no JSON object; write objects", line=number)
        yield number, value
