"""How what stood before training is spoken of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.edits.admission import Sifted


def sifted_lines(sifted: Sifted) -> list[str]:
    """A line for every edit that was left out."""
    left_out = (*sifted.known, *sifted.dropped)
    return [f"left out: {one.id} (line {one.line}): {one.reason}" for one in left_out]


def sifted_json(sifted: Sifted) -> dict[str, Any]:
    """What ``--json`` prints of it."""
    return {
        "known": [asdict(one) for one in sifted.known],
        "dropped": [asdict(one) for one in sifted.dropped],
        "conflicts": list(sifted.told),
    }
