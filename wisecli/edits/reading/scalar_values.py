"""Numbers, dates and truth values that stand where an answer should → their texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any

# Fields of any layout that hold an answer, or a name.
_ANSWER_FIELDS = """
    target alt target_new ans str replacement subject answer ground_truth loc_ans locality_ground_truth mhop_ans
    new_answer object value output completion response content answer_2hop answer_3hop answer_4hop answer_5hop
    answer_6hop
"""
_ANSWERS = frozenset(_ANSWER_FIELDS.split())


class WrittenNumber(float):
    """A number with a fraction as it was written: ``3.50`` is a price, and not 3.5."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        """Read a number and keep its spelling."""
        found = super().__new__(cls, text)
        found.text = text
        return found


def with_texts(record: dict[str, Any], noted: Callable[[str], None]) -> dict[str, Any]:
    """Return a record in which every answer is a text.

    Args:
        noted: told a sentence on each value that was none.
    """
    return {name: _value(name, value, noted) for name, value in record.items()}


def text_of(value: Any) -> str | None:
    """Return the text of a number, a truth value, a date or a time; None of anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, int | float | Decimal) else None


def _value(name: str, value: Any, noted: Callable[[str], None]) -> Any:
    """Return a field with numbers and dates among its answers as texts; each such change is noted."""
    if isinstance(value, dict):
        return {inner: _value(inner, inner_value, noted) for inner, inner_value in value.items()}
    if isinstance(value, list):
        return [_value(name, inner_value, noted) for inner_value in value]
    text = text_of(value)
    if text is None or name not in _ANSWERS:
        return text if isinstance(value, date | Decimal) else value
    noted(f"`{name}` is {_called(value)} {text}, taken as the text {text!r}")
    return text


def _called(value: Any) -> str:
    if isinstance(value, bool):
        return "the truth value"
    return "the date" if isinstance(value, date) else "the number"
