"""Write docs/commands.md and docs/settings.md from the program; with --check, say if they are up to date."""

import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from wisecli.cli.app import program
from wisecli.cli.setting_options import rows_of
from wisecli.cli.setting_table import KINDS

DOCS = Path(__file__).parent.parent / "docs"
_WRITTEN = "This page is written by `scripts/help_text.py`."
# Options that as many commands have in the same words stand in a table of their own.
_COMMON = 3
# Commands with no more arguments and options of their own share a table.
_FEW = 4


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def option_row(option: Any) -> tuple[str, str, str]:
    """What is written for an option, what it does, and its default."""
    names = [*sorted(option.opts, key=len, reverse=True), *option.secondary_opts]
    written = ", ".join(f"`{name} {option.metavar}`" if option.metavar else f"`{name}`" for name in names[:1])
    written += "".join(f", `{name}`" for name in names[1:])
    text, _, default = re.sub(r"\[/?dim\]|\\(?=\[)", "", option.help or "").partition(" [default: ")
    default = default.removesuffix("]")
    if not default and option.show_default and option.default not in (None, False, ()):
        default = str(option.default)
    default = "required" if option.required else default
    return written, text, default


def arguments_of(command: Any) -> list[tuple[str, str, str]]:
    """The rows of a command's arguments."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    names = [f"`{one.name}`" + (" …" if one.nargs < 0 else "") for one in arguments]
    needed = ["required" if one.required else "" for one in arguments]
    return [(name, one.help, need) for name, one, need in zip(names, arguments, needed, strict=True)]


def commands() -> str:
    """The page of commands."""
    every = typer.main.get_command(program()).commands
    options = {
        name: [option_row(one) for one in command.params if one.param_type_name == "option" and not one.hidden]
        for name, command in every.items()
    }
    having: dict[tuple[str, str, str], list[str]] = {}
    for name, rows in options.items():
        for row in rows:
            having.setdefault(row, []).append(name)
    common = {row: names for row, names in having.items() if len(names) >= _COMMON}
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, command in every.items():
        groups.setdefault(command.rich_help_panel, []).append((name, command))
    own = {name: arguments_of(command) for name, command in every.items()}
    for name, rows in options.items():
        own[name] += [row for row in rows if row not in common]
    long = {name: rows for name, rows in own.items() if len(rows) > _FEW}
    listed = [
        (f"[`{name}`](#{f'wise-{name}' if name in long else 'others'})", command.help, panel if not index else "")
        for panel, some in groups.items()
        for index, (name, command) in enumerate(some)
    ]
    page = f"# Commands\n\n{_WRITTEN} `wise COMMAND --help` prints the same by subject.\n\n"
    page += table(("command", "what it does", "for"), *listed)
    page += "\n`wise` itself has `--version`, `--debug` (shows tracebacks), `--install-completion` and\n"
    page += (
        "`--show-completion`, and every command `--help` (`-h`). Arguments stand first in each table, in their order.\n"
    )
    shared = [(*row, "all" if len(names) == len(every) else ", ".join(names)) for row, names in common.items()]
    page += "\n## Common options\n\n" + table(("option", "meaning", "default", "of"), *shared)
    for name, rows in long.items():
        page += f"\n## wise {name}\n\n" + table(("argument or option", "meaning", "default"), *rows)
    few = [(f"`wise {name}`", *row) for name, rows in own.items() if name not in long for row in rows]
    return page + "\n## Others\n\n" + table(("command", "argument or option", "meaning", "default"), *few)


def settings() -> str:
    """The page of settings."""
    page = f"""# Settings

{_WRITTEN} `wise settings COMMAND` prints the same.

A setting comes from the command line (`--set NAME=VALUE`, or an option of its own), else from a variable
`WISE_NAME`, else from the command's table in the file of `--config`, else from the preset.
"""
    for command in KINDS:
        rows = [(f"`{name}`", *rest) for name, *rest in rows_of(command)]
        page += f"\n## wise {command}\n\n" + table(("name", "values", "default", "meaning"), *rows)
    return page


if __name__ == "__main__":
    for path, page in ((DOCS / "commands.md", commands()), (DOCS / "settings.md", settings())):
        if "--check" not in sys.argv:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path.name} is out of date; run python scripts/help_text.py")
