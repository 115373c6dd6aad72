"""The command line: its commands, and how errors end them. Nothing here imports torch before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from wisecli import __version__
from wisecli.cli.bench import bench
from wisecli.cli.checkpoint import export, generate
from wisecli.cli.console import fail, quiet_libraries
from wisecli.cli.draft import draft
from wisecli.cli.edit import edit
from wisecli.cli.evaluate import evaluate, fetch
from wisecli.cli.inspection import inspect, verify
from wisecli.cli.memory import diff, explain, log, remove, rollback
from wisecli.cli.merge import merge
from wisecli.cli.parameters import PanelledCommand, PanelledGroup
from wisecli.errors import WiseError

app = typer.Typer(
    name="wise",
    cls=PanelledGroup,
    help="Edit what a language model knows, without retraining it and without breaking the rest of what it knows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 (read in main)
) -> None:
    if version:
        typer.echo(f"wise {__version__}")
        raise typer.Exit


# Panels and commands, in the order in which the help lists them.
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "From edits to a checkpoint": {"edit": edit, "merge": merge, "eval": evaluate, "export": export},
    "Use and look into": {
        "generate": generate,
        "explain": explain,
        "inspect": inspect,
        "verify": verify,
        "diff": diff,
        "log": log,
    },
    "Change a memory": {"remove": remove, "rollback": rollback},
    "Laboratory": {"bench": bench},
    "Get something to start with": {"fetch": fetch, "draft": draft},
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, cls=PanelledCommand, rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the command line; every error the user can act on ends in one sentence and its exit code."""
    debug = "--debug" in sys.argv[1:2]
    quiet_libraries()
    if "_WISE_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "1000"  # a description on two lines would be two proposals to fish
    try:
        app(prog_name="wise")
    except WiseError as error:
        if debug:
            raise
        fail(str(error), error.details)
        sys.exit(error.exit_code)
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:  # Typer has caught the interruption, and says nothing of it
            fail("interrupted; nothing was written")
        raise
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        fail(f"{type(error).__name__}: {error}; this is a fault in wise, `wise --debug ...` shows where")
        sys.exit(2)
