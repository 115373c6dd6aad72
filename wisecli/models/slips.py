"""Names that are nearly another, and slips of the keyboard."""

from __future__ import annotations

import random
from collections.abc import Sequence

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The key beside each, to the right; of the last of a row to the left.
_BESIDE = {
    key: other
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for key, other in zip(row, row[1:] + row[-2], strict=True)
}
SLIPS = ("swap", "drop", "double", "near")


def near_name(subject: str, how: str, words: Sequence[str], chance: random.Random) -> str | None:
    """A name that is like the subject but for one ``word``, one ``added`` word, an ``initial`` or a ``letter``."""
    parts = subject.split(" ")
    if how == "added":
        return f"{chance.choice(words)} {subject}" if chance.random() < 0.5 else f"{subject} {chance.choice(words)}"
    if how == "word":
        if len(parts) < 2:
            return None
        parts[chance.randrange(len(parts))] = chance.choice(words)
        return " ".join(parts)
    if how == "initial" and len(parts) > 1:
        initial = chance.choice("BDFGKLMPRTV")
        return " ".join([parts[0], f"{initial}.", *parts[1:]])
    at = 0 if how == "initial" else chance.randrange(len(subject))
    other = chance.choice("0123456789" if subject[at].isdecimal() else _LETTERS)
    if not subject[at].isalnum() or other == subject[at].lower():
        return None
    return subject[:at] + (other.upper() if subject[at].isupper() else other) + subject[at + 1 :]


def with_slips(text: str, how: str, chance: random.Random, count: int = 2) -> str | None:
    """A text with so many slips of the keyboard, each in a word of its own of four letters or more."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) > 3 and word.rstrip("?.,").isalpha()]
    if len(long) < count:
        return None
    for place in chance.sample(long, count):
        words[place] = _slipped(words[place], how, chance)
    return " ".join(words)


def _slipped(word: str, how: str, chance: random.Random) -> str:
    at = chance.randrange(1, len(word.rstrip("?.,")) - 1)
    if how == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if how == "drop":
        return word[:at] + word[at + 1 :]
    if how == "double":
        return word[: at + 1] + word[at:]
    return word[:at] + _BESIDE.get(word[at].lower(), "x") + word[at + 1 :]
