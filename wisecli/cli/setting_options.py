"""``--set NAME=VALUE``: settings of a command, most of which have no option of their own."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wisecli.cli.parameters import option
from wisecli.cli.setting_table import KINDS, TEXTS
from wisecli.errors import SettingsError
from wisecli.validated_settings import unwrapped


def set_of(command: str, panel: str) -> Any:
    """Return the option ``--set`` of a command."""

    def complete(incomplete: str) -> list[str]:
        return _proposed(command, incomplete)

    text = f"A setting, as NAME=VALUE; may be given again. `wise settings {command}` lists them."
    return option(text, "--set", panel=panel, complete=complete)


def _proposed(command: str, incomplete: str) -> list[str]:
    """Return what the shell proposes: names, and after a name its values, if they are few."""
    name, between, value = incomplete.partition("=")
    rows = {row[0]: row[1].split(", ") for row in rows_of(command)}
    if not between:
        return [f"{row}=" for row in rows if row.startswith(name)]
    values = rows.get(name, [])
    return [f"{name}={proposed}" for proposed in values if len(values) > 1 and proposed.startswith(value)]


def settings_in(command: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of texts ``NAME=VALUE``, by the settings' names.

    Raises:
        SettingsError: a text is no such pair, the command has no such setting, or it may not have that value.
    """
    known = {field.name: kind for kind in KINDS[command] for field in fields(kind)}
    found = {}
    for text in texts or ():
        name, between, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not between or name not in known:
            raise SettingsError(f"--set {text!r}: {_remedy(command, name, known, has_value=bool(between))}")
        found[name] = known[name].read(name, value)
    return found


def _remedy(command: str, name: str, known: Collection[str], *, has_value: bool) -> str:
    if name in known and not has_value:
        return f"give a value, as in --set {name}=VALUE"
    close = get_close_matches(name, sorted(known), n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"`wise {command}` has no such setting; {meant}`wise settings {command}` lists them"


def rows_of(command: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, values, default and meaning of every setting of a command."""
    for kind in KINDS[command]:
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = "" if field.default is None else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            yield field.name, _values(hints[field.name]), default, TEXTS[kind][field.name]


_WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text"}


def _values(hint: Any) -> str:
    """Return what values a setting may have."""
    kind, bounds, _ = unwrapped(hint)
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "numbers, with commas between"
    return _WORDS[kind] + ("" if bounds is None else f" from {bounds.least:g} to {bounds.most:g}")
