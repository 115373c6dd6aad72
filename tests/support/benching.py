"""Records of made-up words that a tiny model can be benched with."""

from __future__ import annotations

import random
from typing import Any

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
