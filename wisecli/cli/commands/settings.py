"""``wise settings``: every setting of a command, its values and its default."""

from typing import Annotated, Any

import typer

from wisecli.cli.choices import one_of
from wisecli.cli.console import Console, Table
from wisecli.cli.options import AsJson
from wisecli.cli.setting_options import rows_of
from wisecli.cli.setting_table import KINDS
from wisecli.errors import SettingsError

_COLUMNS = ("name", "values", "default", "meaning")


def settings(
    command: Annotated[
        str | None,
        typer.Argument(help="edit, merge, eval or bench; all if not given.", autocompletion=one_of(tuple(KINDS))),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List settings for --set, for the tables of a settings file, and for WISE_… variables."""
    if command is not None and command not in KINDS:
        raise SettingsError(f"`wise {command}` has no settings; name one of {', '.join(KINDS)}")
    chosen = KINDS if command is None else {command: KINDS[command]}
    tables = []
    results: dict[str, list[dict[str, Any]]] = {}
    for name in chosen:
        rows = list(rows_of(name))
        results[name] = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        table = Table(_COLUMNS, title=f"wise {name}")
        for row in rows:
            table.add(*row)
        tables.append(table)
    Console(as_json).result({"results": results}, *tables)
