"""Texts as they are compared: what two people would call the same is the same."""

from __future__ import annotations

import unicodedata


def folded(text: str) -> str:
    """A text without upper case, without extra white space, and in one of the forms that Unicode has for it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
