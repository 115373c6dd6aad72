"""Settings of version 0.1 that went, and today's in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What there is in the place of each.
RETIRED = {
    "router": "what prompts ask opens what the closed form wrote; --mode merge makes a matrix of it",
    "routing": "a prompt is decided once; --pooling says how a matrix reads it",
    "sharpness": "the nearest key of an edit answers",
}
# Which of its routers were of matrices.
_OF_MATRICES = ("key", "norm")


def of_today(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of version 0.1 under today's names: a router and its routing are a mode and a pooling."""
    found = {name: value for name, value in record.items() if name not in RETIRED}
    if record.get("router") in _OF_MATRICES:
        found["mode"] = record["mode"] if record.get("mode") in ("merge", "retrieve") else "merge"
    elif record.get("router") is not None:
        found.setdefault("mode", "lookup")
    if record.get("routing") == "mean":
        found["pooling"] = "mean"
    return found
