"""Write docs/commands.md and docs/settings.md from the program; with --check, say if they are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

from wisecli.cli.app import NAMES
from wisecli.cli.setting_options import rows_of
from wisecli.cli.setting_table import KINDS

COMMANDS = ("", *NAMES)
DOCS = Path(__file__).parent.parent / "docs"
_WRITTEN = "This page is written by `scripts/help_text.py`."


def help_of(command: str) -> str:
    """What ``wise COMMAND --help`` prints, 80 columns wide and without colour."""
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}
    arguments = [sys.executable, "-m", "wisecli", *command.split(), "--help"]
    text = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout  # nosec B603
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def commands() -> str:
    """The page of commands."""
    blocks = [f"## wise {command}".rstrip() + f"\n\n```text\n{help_of(command)}\n```" for command in COMMANDS]
    return f"# Commands\n\n{_WRITTEN}\n\n" + "\n\n".join(blocks) + "\n"


def settings() -> str:
    """The page of settings."""
    page = f"""# Settings

{_WRITTEN} `wise settings COMMAND` prints the same.

A setting comes from the command line (`--set NAME=VALUE`, or an option of its own), else from a variable
`WISE_NAME`, else from the command's table in the file of `--config`, else from the preset.
"""
    for command in KINDS:
        page += f"\n## wise {command}\n\n| name | values | default | meaning |\n| --- | --- | --- | --- |\n"
        page += "".join(f"| `{name}` | {' | '.join(rest)} |\n" for name, *rest in rows_of(command))
    return page


if __name__ == "__main__":
    for path, page in ((DOCS / "commands.md", commands()), (DOCS / "settings.md", settings())):
        if "--check" not in sys.argv:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path.name} is out of date; run python scripts/help_text.py")
