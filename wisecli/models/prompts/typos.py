"""Names that are nearly another, and slips of the keyboard."""

import random
from collections.abc import Sequence

_INITIALS = "BDFGKLMPRTV"
# The key beside each, to the right; of the last of a row to the left.
_BESIDE = {
    key: other
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for key, other in zip(row, row[1:] + row[-2], strict=True)
}
TYPO_KINDS = ("swap", "drop", "double", "near")
# Those that may be learned from; the others are for evaluation alone.
LEARNED_TYPOS = TYPO_KINDS[:2]


def near_name(subject: str, how: str, words: Sequence[str], rng: random.Random) -> str | None:
    """Return a name that somebody else has, like the subject but for one part; None where it has no such part.

    No letter alone is changed, and no initial put in: that could be the same name.

    Args:
        how: another ``word``, another ``last`` word, one ``added`` word, another ``initial``, or other ``digits``.
        words: those that are put in.
    """
    parts, word = subject.split(" "), rng.choice(words)
    if how == "added":
        return rng.choice((f"{word} {subject}", f"{subject} {word}"))
    if how == "last":
        return " ".join([*(parts[:-1] or parts), word])
    if how == "digits":
        other = "".join(rng.choice("0123456789") if letter.isdecimal() else letter for letter in subject)
        return None if other == subject else other
    if len(parts) < 2:
        return None
    places = list(range(len(parts)))
    if how == "initial":
        places = [index for index in places if len(parts[index].rstrip(".")) == 1 and parts[index].isupper()]
        word = rng.choice(_INITIALS) + "."
    if not places:
        return None
    index = rng.choice(places)
    changed = " ".join([*parts[:index], word, *parts[index + 1 :]])
    return None if changed == subject else changed


def with_typos(text: str, how: str, rng: random.Random) -> str | None:
    """Return a text with two slips of the keyboard, each in words of four letters or more, if it has two such words."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 3 and word.rstrip("?.,").isalpha()]
    if len(long) < 2:
        return None
    for index in rng.sample(long, 2):
        words[index] = _with_typo(words[index], how, rng)
    return " ".join(words)


def _with_typo(word: str, how: str, rng: random.Random) -> str:
    """Return a word with one typing error inside it."""
    at = rng.randrange(1, len(word.rstrip("?.,")) - 1)
    if how == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if how == "drop":
        return word[:at] + word[at + 1 :]
    if how == "double":
        return word[: at + 1] + word[at:]
    return word[:at] + _BESIDE.get(word[at].lower(), "x") + word[at + 1 :]
