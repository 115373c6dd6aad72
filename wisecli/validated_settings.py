"""Settings that check themselves: each value is of its field's kind and within its bounds; and their files."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from wisecli.data.packaged import tomllib
from wisecli.errors import SettingsError

# What is written around a type: bounds, and that there may be none.
_AROUND = (Annotated, Union, UnionType)
_TRUTHS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, both of them inside."""

    least: float
    most: float


class Validated:
    """Settings whose values are of their fields' kinds and within their bounds, however they are made.

    They are checked here and not by pydantic, which takes longer to import than all else that a refusal needs.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(cast(Any, type(self))).items():
            object.__setattr__(self, name, _converted(name, getattr(self, name), hint))

    @classmethod
    def read(cls, name: str, text: str) -> Any:
        """Return a text as the value of a field.

        Raises:
            SettingsError: it is of the wrong kind or out of bounds.
        """
        return _converted(name, text, _hints(cast(Any, cls))[name])


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the types of a class' fields, with their bounds."""
    return get_type_hints(kind, include_extras=True)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """Return a value as its field's type; texts, as of variables, are read as what they stand for.

    Raises:
        SettingsError: it is of the wrong kind or out of bounds.
    """
    kind, bounds, optional = unwrapped(hint)
    if value is None and optional:
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SettingsError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        return value
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise SettingsError(f"{name} must be values with commas between, not {value!r}")
        return tuple(_converted(name, part, get_args(kind)[0]) for part in parts)
    try:
        found = _READERS[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise SettingsError(f"{name} must be {_WORDS[kind]}, not {value!r}") from None
    if bounds is not None and not bounds.least <= found <= bounds.most:
        raise SettingsError(f"{name} must lie between {bounds.least:g} and {bounds.most:g}, not {found!r}")
    return found


def unwrapped(hint: Any) -> tuple[Any, Bounds | None, bool]:
    """Return a field's type without what is written around it, its bounds, and whether there may be no value."""
    bounds, optional = None, False
    while get_origin(hint) in _AROUND:
        bounds = next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Bounds)), bounds)
        optional |= NoneType in get_args(hint)
        hint = next(option for option in get_args(hint) if option is not NoneType)
    return hint, bounds, optional


def read_toml(file: Path) -> dict[str, Any]:
    """Return the content of a settings file.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: not readable as TOML ({error})") from None


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | int) or str(value).lower() not in _TRUTHS:
        raise ValueError("no truth value")
    return _TRUTHS[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("no text or number")
    return str(value)


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("no whole number")
    return int(value if isinstance(value, float) else _text(value))


_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
# As a manifest or a settings file may have them, a layer is a text though it looks like a number.
_READERS: dict[Any, Any] = {bool: _truth, int: _whole, float: lambda value: float(_text(value)), str: _text}
