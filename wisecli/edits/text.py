"""Texts as they are compared: what two people would call the same is the same."""

import re
import unicodedata
from collections.abc import Sequence


def folded(text: str) -> str:
    """Return a text without upper case, without extra white space, and in one of the forms that Unicode has for it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_WORD = re.compile(r"\w+")


def unmarked(text: str) -> str:
    """Return a text without case, and without the marks and blanks that stand around it."""
    return text.casefold().strip(" .\n\t\"'")


def words(text: str) -> list[str]:
    """Return a text's words without their case and the characters between them."""
    return _WORD.findall(text.casefold())


def contains(whole: Sequence[str], part: Sequence[str]) -> bool:
    """Return whether words stand in others in one piece; no words stand in any."""
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


# Joiners of Persian and Indian words and of emoji; they steer nothing.
_JOINERS = "\u200c\u200d"


def plain(text: str) -> str:
    """Return a foreign text on one line, with control and invisible characters spelt out."""
    return "".join(character if is_plain(character) else repr(character)[1:-1] for character in text)


def is_plain(character: str) -> bool:
    """Return whether a character can be printed as it is."""
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def is_visible(text: str) -> bool:
    """Return whether there is anything in a text that can be seen."""
    return any(character.isprintable() and not character.isspace() for character in text)


def edits_with(edits: int, consequences: int) -> str:
    """Return how many edits there are, and how many consequences of theirs, if there are any."""
    followed = f" with {consequences} consequence{'' if consequences == 1 else 's'}" if consequences else ""
    return f"{edits} edit{'' if edits == 1 else 's'}{followed}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose cells must not hold what divides them."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
