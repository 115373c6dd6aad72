"""Files of JSON lines that grow as things are measured, and are read again after a run was broken off."""

import json
from pathlib import Path
from typing import Any

from wisecli.errors import DamagedFileError


def append_line(file: Path, value: Any) -> None:
    """Write one more line, at once; directories that are missing are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        stream.write(json.dumps(value).encode() + b"\n")


def whole_lines(file: Path) -> list[Any]:
    """Return what the lines say, none without a file. A last line that was broken off is cut away, and more may follow.

    Raises:
        DamagedFileError: another line is no JSON.
    """
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as stream:
            stream.truncate(whole)
    return [_value(file, number, line) for number, line in enumerate(content[:whole].splitlines(), start=1)]


def _value(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise DamagedFileError(file, f"line {number} is no JSON", "delete that line, or the file") from None
