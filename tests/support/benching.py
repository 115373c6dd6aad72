"""Records of made-up words that a tiny model can be benched with."""

import random
from typing import Any

import pytest

from support.quick_edits import edit_quickly
from wisecli.bench.reporting import html_tables
from wisecli.evaluation import protocols

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]


def record(number: int) -> dict[str, Any]:
    chance = random.Random(number)
    subject, other = chance.sample(SYLLABLES, 2)
    return {
        "id": str(number),
        "prompt": f"{subject} {SYLLABLES[number]} ka",
        "target": SYLLABLES[number + 9],
        "subject": subject,
        "rephrases": [f"ka {subject} {SYLLABLES[number]}"],
        "locality": [{"prompt": f"{other} mo", "answer": "be"}],
    }


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Let benches read little unrelated text, take short answers in WILD, and draw nothing.

    A tiny model hardly ever ends an answer by itself. ``tests/bench/reporting`` has pictures drawn.
    """
    edit_quickly(patch)
    patch.setattr(protocols, "MAX_NEW_TOKENS", 6)
    patch.setattr(html_tables, "pictures", lambda _rows: [])
