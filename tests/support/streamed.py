"""Edits of a model whose layers are read as they run, beside the same edits of the model in memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.helpers import assert_same_tensors
from wisecli.commands.edit.edit import edit
from wisecli.config import EditSettings, LoadOptions
from wisecli.models.running import quick_products


def assert_edited_the_same_streamed(
    root: Path, base: Path, records: Sequence[dict[str, Any]], settings: EditSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edit a base both ways, with a cache each and exact products, and compare every tensor that is written."""
    monkeypatch.setattr(quick_products, "has_quick_bfloat16", lambda: False)  # a model in memory alone has such
    edits = root / "edits.jsonl"
    edits.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, budget in (("whole", None), ("streamed", 1000)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / f"cache-{name}"))
        edit(str(base), edits, root / name, settings, load=LoadOptions(device="cpu", memory_budget=budget))
    for path in (root / "whole").glob("*.safetensors"):
        assert_same_tensors(root / "streamed" / path.name, path)
