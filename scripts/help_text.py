"""Write docs/commands.md from the program's own help, or with --check say whether it is up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

from wisecli.cli.app import NAMES

COMMANDS = ("", *NAMES)
PAGE = Path(__file__).parent.parent / "docs" / "commands.md"


def help_of(command: str) -> str:
    """What ``wise COMMAND --help`` prints, 80 columns wide and without colour."""
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}
    arguments = [sys.executable, "-m", "wisecli", *command.split(), "--help"]
    text = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout  # nosec B603
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def page() -> str:
    """The whole page."""
    blocks = [f"## wise {command}".rstrip() + f"\n\n```text\n{help_of(command)}\n```" for command in COMMANDS]
    return "# Commands\n\nThis page is written by `scripts/help_text.py`.\n\n" + "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is out of date; run python scripts/help_text.py")
