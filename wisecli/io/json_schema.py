"""JSON → dataclasses: the dataclass is the schema, and every field is checked for its type before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")

# What is nested deeper was made to exhaust the stack of whatever walks through it.
_DEPTH = 64
# Beyond it a whole number is no count, no shape and no seed.
_LARGEST = 2**53
_LARGEST_FLOAT = 1e300
# Where JSON that `json.dumps` wrote has neither in it, no number within it is as large; some texts look like one.
_LONG_NUMBER = re.compile(r"[\[ -]\d{16,}[,\]}]")
_LARGE_NUMBER = re.compile(r"e\+(?<=\de\+)\d|(?:NaN|Infinity)(?![^,\]}])")
# What the latter has in it, which is looked for in less time.
_LARGE = ("e+", "NaN", "Infinity")
# What pydantic found wrong, and what should stand there.
_WHOLE, _NUMBER, _RECORD, _LIST = "a whole number", "a finite number", "an object", "a list"
_EXPECTED = {
    "string_type": "a text",
    "string_unicode": "a text",
    "bool_type": "true or false",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), _NUMBER),
    **dict.fromkeys(("dataclass_type", "dataclass_exact_type", "dict_type", "model_type"), _RECORD),
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
}
# How records are read: a closed one refuses fields that it does not have, an open one passes over them.
CLOSED: ConfigDict = {"extra": "forbid", "allow_inf_nan": False}
OPEN: ConfigDict = {"extra": "ignore", "allow_inf_nan": False}


def parse(text: str) -> Any:
    """Read JSON from an untrusted source.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds text that is no Unicode.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:
        require_sane(value)
    else:  # whole characters, as the text has them
        _require_shallow(value)
    return value


def require_sane(value: Any) -> None:
    """Check that JSON is not nested deeper than anything of ours, and that all its texts can be written down again.

    Raises:
        ValueError: saying which of the two it is.
    """
    _require_shallow(value)
    _require_unicode(value)


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [part for held in map(_held, level) for part in held if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError("nested too deeply")


def _require_unicode(value: Any) -> None:
    """Check that all texts in a JSON value can be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"half a character (a lone surrogate) in {shown(value)}") from None
    for part in (*value, *value.values()) if isinstance(value, dict) else _held(value):
        _require_unicode(part)


def _held(value: Any) -> Iterable[Any]:
    """Yield what an object or a list holds."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def decode(kind: type[T], value: object, where: str = "") -> T:
    """Return a JSON value as a dataclass (or as a plain type, tuple, dict or literal of such), by pydantic in strict
    mode.

    A field with a default may be missing. Fields that a dataclass does not have are refused unless it says otherwise:
    each says so by its ``__pydantic_config__``, which is :data:`CLOSED` or :data:`OPEN`. Numbers are finite, and whole
    numbers less than 2⁵³.

    Raises:
        ValueError: naming the first field that is missing or of the wrong kind.
    """
    from pydantic import ValidationError  # what is refused without it is refused at once

    # As JSON text: in strict mode only there does a list stand for a tuple.
    text = json.dumps(value, default=repr)
    try:
        decoded: T = _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False), value, where)) from None
    if _may_be_large(text):
        _require_bounded(decoded, where)
    return decoded


def _may_be_large(text: str) -> bool:
    """Return whether JSON may hold a number beyond the bounds; a number alone may be one."""
    if text[0] in "-0123456789" or _LONG_NUMBER.search(text):
        return True
    return any(part in text for part in _LARGE) and _LARGE_NUMBER.search(text) is not None


def require_moment(text: str, where: str) -> None:
    """Check that a text is a date or a time.

    Raises:
        ValueError: naming the field it stands in.
    """
    try:
        # Python 3.10 does not know the Z that UTC is written with.
        datetime.fromisoformat(text.removesuffix("Z") + "+00:00" if text.endswith("Z") and "T" in text else text)
    except ValueError:
        raise ValueError(
            f"`{where}` must be a date or time as in ISO 8601, 2026-11-20 or 2026-11-20T09:30:00Z, not {shown(text)}"
        ) from None


def shown(value: object, limit: int = 60) -> str:
    """Return any value as a message may quote it: short, and on one line."""
    quoted = repr(value[:limit] if isinstance(value, str | bytes) else value)
    return quoted if len(quoted) <= limit + 2 else f"{quoted[:limit]}…"


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _sentence(errors: Sequence[ErrorDetails], value: object, where: str) -> str:
    """Return what the first error says; of a value that fits none of several types, what the last type says of it."""
    location, found = _location(errors[0]["loc"], value)
    alike = [error for error in errors if _location(error["loc"], value)[0] == location]
    error = alike[-1]
    name = _named(where, location)
    kind = error["type"]
    if kind in ("missing", "missing_argument"):
        field = error["loc"][-1]
        if isinstance(field, int):  # of a tuple that is too short
            return f"`{name}` must be a list of {_length(errors, value, location)}, not {shown(found)}"
        return f"`{_named(where, (*location, field))}` is missing"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"`{name}` is unknown"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"`{name}` must be one of {', '.join(choices)}, not {shown(found)}"
    if kind == "too_long":
        return f"`{name}` must be a list of {error['ctx']['max_length']}, not {shown(found)}"
    return f"`{name or 'the whole'}` must be {_EXPECTED.get(kind, 'something else')}, not {shown(found)}"


def _location(loc: Sequence[str | int], value: object) -> tuple[tuple[str | int, ...], object]:
    """Return the part of an error's location that is in the value, without the types tried there, and what is there."""
    location: tuple[str | int, ...] = ()
    for step in loc:
        inside = isinstance(value, dict) and step in value
        inside |= isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        if inside:
            location, value = (*location, step), value[step]  # type: ignore[index]
    return location, value


def _length(errors: Sequence[ErrorDetails], value: object, location: tuple[str | int, ...]) -> int:
    """Return how long a tuple must be that lacks its last entries."""
    lacking = (error["loc"][-1] for error in errors if _location(error["loc"], value)[0] == location)
    return 1 + max(step for step in lacking if isinstance(step, int))


def _named(where: str, location: Sequence[str | int]) -> str:
    """Return a place as it is written: ``leaves[0].name``."""
    name = where
    for step in location:
        name += f"[{step}]" if isinstance(step, int) else f"{'.' if name else ''}{step}"
    return name


def _require_bounded(value: Any, where: str) -> None:
    """Check the numbers of a decoded value, except in records that are kept as they came (``dict[str, Any]``)."""
    if type(value) is int and abs(value) >= _LARGEST:
        raise ValueError(f"`{where}` must be a whole number, not {shown(value)}")
    if type(value) is float and not abs(value) <= _LARGEST_FLOAT:
        raise ValueError(f"`{where}` must be a finite number, not {shown(value)}")
    for step, part in _parts(value):
        _require_bounded(part, _named(where, (step,)))


def _parts(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield what a decoded value is made of, and where."""
    if isinstance(value, tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif is_dataclass(value):
        for field in fields(value):
            if field.type not in ("dict[str, Any]", dict[str, Any]):
                yield field.name, getattr(value, field.name)
