"""Files of edits, well formed or not."""

import json
from pathlib import Path
from typing import Any

FIRST = {"prompt": "The mayor of Oldbridge is", "target": "Ada Finch"}
SECOND = {"prompt": "The Oldbridge ferry leaves from", "target": "pier nine"}


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def saved(directory: Path, content: str | bytes) -> Path:
    path = directory / "edits.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
