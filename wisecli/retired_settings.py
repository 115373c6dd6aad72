"""Settings of version 0.1 that went, and today's in their place."""

from collections.abc import Container, Mapping
from typing import Any

# What there is in the place of each.
RETIRED = {
    "router": "what prompts ask opens what the closed form wrote; in_forms=false is for a matrix that always answers",
    "routing": "a prompt is decided once; pooling says how a matrix reads it",
    "sharpness": "the nearest key of an edit answers",
}
# Edits that these opened were not trained in forms.
_OF_MATRICES = ("key", "norm")


def with_current_names(record: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Return settings with those of version 0.1 replaced by what they are called now.

    Args:
        names: the settings that the caller knows; others are not added.
    """
    found = {name: value for name, value in record.items() if name not in RETIRED}
    if record.get("router") in _OF_MATRICES and "in_forms" in names:
        found.setdefault("in_forms", False)
    if record.get("routing") == "mean" and "pooling" in names:
        found["pooling"] = "mean"
    return found
