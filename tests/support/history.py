"""Edits of a tiny model, for memories that are edited again and again."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.helpers import WORDS
from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.commands.edit.edit_into import Batch
from wisecli.edits.checks.admission import DEFAULT_ADMISSION
from wisecli.edits.record import Edit

FLAGS: dict[str, Any] = {
    "layer": "2",
    "unrelated_texts": 16,
    "edits_per_shard": 4,
    "residual_steps": 20,
    "residual_more": 0,
}


def fact(number: int, *, target: int = 0, name: str | None = None) -> Edit:
    chance = random.Random(number)
    prompt = " ".join(chance.sample(WORDS[:40], 3))
    return Edit(name or f"e{number}", prompt, WORDS[40 + (number + target) % 20], subject=prompt.split()[0])


def write(path: Path, edits: Sequence[Edit]) -> Path:
    path.write_text("".join(json.dumps(edit.as_dict()) + "\n" for edit in edits), encoding="utf-8")
    return path


def held(memory: Path) -> list[str]:
    """The ids of the edits that a memory holds."""
    return [edit.id for edit in read_manifest(memory).edits]


def batch_from(path: Path) -> Batch:
    """A whole file of edits."""
    return Batch.of(DEFAULT_ADMISSION.read(path, name=path.name))
