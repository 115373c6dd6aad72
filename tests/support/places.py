"""Directories of every kind that the commands write, on a tiny model, for tests that look into them or damage them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.helpers import save_tiny
from support.loading import CPU
from wisecli.artifacts.checksums import write_checksums
from wisecli.commands.checkpoint.export import export
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.memory.history.release_log import HISTORY

EDITS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "ba be bi", "target": "do du", "subject": "Bebi", "rephrases": ["bi be ba"]},
    {"id": "two", "prompt": "ka ke ki ko", "target": "fa", "locality": [{"prompt": "mu ma", "answer": "me mi"}]},
    {"id": "three", "prompt": "ma me", "target": "ga ge gi", "irrelevant": ["ta to"]},
]
PLACES = ("shards", "memory", "retrieve", "edited")


def make_places(root: Path) -> Path:
    """A model, shards of it, two kinds of memory and an exported checkpoint."""
    base = save_tiny(root / "model")
    (root / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    quick = EditSettings(passes=2, unrelated_texts=16, shards=2, residual_stop=0.2)
    run_edit(str(base), root / "edits.jsonl", root / "shards", quick, load=CPU)
    merge([root / "shards"], root / "memory", MergeSettings())
    gradient = EditSettings(passes=2, unrelated_texts=16, shards=2, writer="gradient")
    run_edit(str(base), root / "edits.jsonl", root / "gradient", gradient, load=CPU)
    merge([root / "gradient"], root / "retrieve", MergeSettings(mode="retrieve"))
    export(root / "memory", root / "edited", load=CPU)
    return root


def copied(root: Path, name: str, target: Path) -> Path:
    """A copy of one of them that may be damaged."""
    return Path(shutil.copytree(root / name, target / name))


def reseal(directory: Path) -> Path:
    """A memory or an export whose digests are taken anew, without a history that could contradict them."""
    shutil.rmtree(directory / HISTORY, ignore_errors=True)
    write_checksums(directory)
    return directory


def change(path: Path, how: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    how(content)
    path.write_text(json.dumps(content), encoding="utf-8")
