"""Texts as they are compared: what two people would call the same is the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def folded(text: str) -> str:
    """A text without upper case, without extra white space, and in one of the forms that Unicode has for it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """A text's words, whatever their case and what stands between them."""
    return _WORD.findall(text.casefold())


def contains(whole: Sequence[str], part: Sequence[str]) -> bool:
    """Whether words stand in others in one piece; no words stand in any."""
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))
