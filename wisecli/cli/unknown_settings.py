"""Unknown names in a settings file and in the environment: no setting is called so."""

import os
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from wisecli.cli.setting_table import KINDS
from wisecli.config import PREFIX
from wisecli.validated_settings import read_toml

# So many names are listed where none is like the one that is unknown.
_LISTED = 8


def unknown_names(file: Path | None = None) -> list[str]:
    """Return a sentence on each unknown table, key and variable of a settings file and the environment.

    Args:
        file: one that :func:`resolve` has read.
    """
    found = []
    tables = {name: {field.name for kind in kinds for field in fields(kind)} for name, kinds in KINDS.items()}
    for name, value in ({} if file is None else read_toml(file)).items():
        if name not in tables:
            what = "table" if isinstance(value, dict) else "key"
            inside = [table for table, names in tables.items() if name.replace("-", "_") in names]
            meant = f"write it below [{inside[0]}]" if inside and what == "key" else _meant(name, tables)
            found.append(f"{file}: the {what} {name!r} is unknown and was passed over; {meant}")
    known = [f"{PREFIX}{name.upper()}" for names in tables.values() for name in names]
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in known:
            found.append(f"the variable {variable} is unknown and was passed over; {_meant(variable, known)}")
    return found


def _meant(name: str, known: Iterable[str]) -> str:
    """Return what to write instead of an unknown name."""
    choices = sorted(set(known))
    close = get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices[:_LISTED])}"
