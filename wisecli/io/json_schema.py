"""JSON → dataclasses: the dataclass is the schema, and every field is checked for its type before it is used."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# What is nested deeper was made to exhaust the stack of whatever walks through it.
_DEPTH = 64
# Beyond it a whole number is no count, no shape and no seed.
_LARGEST = 2**53
_KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}


def parse(text: str) -> Any:
    """Read JSON that nobody vouches for.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds text that is no Unicode.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    require_sane(value)
    return value


def require_sane(value: Any) -> None:
    """Check that JSON is not nested deeper than anything of ours, and that all its texts can be written down again.

    Raises:
        ValueError: saying which of the two it is.
    """
    level = [value]
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _require_unicode(item)
            elif isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
        if not level:
            return
    raise ValueError("nested too deeply")


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"half a character (a lone surrogate) in {shown(text)}") from None


def decode(kind: type[T], value: object, where: str = "") -> T:
    """Turn a JSON value into a dataclass (or a plain type, tuple, dict or literal of such).

    A field with a default may be missing. Fields that the dataclass does not have are refused, unless it has an
    attribute ``OPEN``. Numbers are finite, and whole numbers less than 2⁵³.

    Raises:
        ValueError: naming the first field that is missing or of the wrong kind.
    """
    decoded: T = _decode(kind, value, where)
    return decoded


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
    """A value as a message may quote it: short, on one line, whatever it is."""
    quoted = repr(value[:limit] if isinstance(value, str | bytes) else value)
    return quoted if len(quoted) <= limit + 2 else f"{quoted[:limit]}…"


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is None:
        return _record(kind, value, where) if is_dataclass(kind) else _plain(kind, value, where)
    if origin in (Union, UnionType):
        return _either(args, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ValueError(f"`{where}` must be one of {', '.join(args)}, not {shown(value)}")
        return value
    if origin is tuple:
        return _tuple(args, value, where)
    _require(isinstance(value, dict), "an object", value, where)
    return {name: _decode(args[1], item, f"{where}.{name}") for name, item in value.items()}


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number and abs(value) < math.inf and abs(value) <= 1e300, _KINDS[float], value, where)
        return float(value)
    exact = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    _require(exact and (kind is not int or abs(value) < _LARGEST), _KINDS[kind], value, where)
    return value


def _either(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not NoneType]
    for kind in others:
        try:
            return _decode(kind, value, where)
        except ValueError:
            continue
    return _decode(last, value, where)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _require(isinstance(value, list | tuple), "a list", value, where)
    wanted = [kinds[0]] * len(value) if kinds[1:] == (...,) else list(kinds)
    _require(len(wanted) == len(value), f"a list of {len(wanted)}", value, where)
    return tuple(_decode(kind, item, f"{where}[{n}]") for n, (kind, item) in enumerate(zip(wanted, value, strict=True)))


def _record(kind: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), "an object", value, where or "the whole")
    hints, prefix = _hints(kind), f"{where}." if where else ""
    unknown = next((name for name in value if name not in hints), None)
    if unknown is not None and not hasattr(kind, "OPEN"):
        raise ValueError(f"`{prefix}{unknown}` is unknown")
    found = {}
    for field in fields(kind):
        if field.name in value:
            found[field.name] = _decode(hints[field.name], value[field.name], prefix + field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"`{prefix}{field.name}` is missing")
    return kind(**found)


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}


def _require(fine: bool, expected: str, value: Any, where: str) -> None:
    if not fine:
        raise ValueError(f"`{where}` must be {expected}, not {shown(value)}")
