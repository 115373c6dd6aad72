"""The command line: its commands, imported only when one is asked for, and how errors end them."""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib import import_module
from typing import Annotated

import typer

from wisecli import __version__
from wisecli.cli.console import fail, quiet_libraries, show_all_letters
from wisecli.errors import WiseError

_INTERRUPTED = 130
# How many objects are made before the garbage collector looks for cycles among them.
_GC_THRESHOLD = 50_000

# Panels and commands, in the order in which the help lists them, with the module and the function of each.
_COMMANDS: dict[str, dict[str, str]] = {
    "From edits to a checkpoint": {
        "edit": "edit.edit",
        "merge": "merge.merge",
        "eval": "evaluate.evaluate",
        "export": "checkpoint.export",
    },
    "Use and look into": {
        "generate": "checkpoint.generate",
        "explain": "memory.explain",
        "inspect": "inspection.inspect",
        "verify": "inspection.verify",
        "check": "check.check",
        "diff": "memory.diff",
        "log": "memory.log",
    },
    "Change a memory": {"remove": "memory.remove", "rollback": "memory.rollback"},
    "Laboratory": {"bench": "bench.bench", "settings": "settings.settings"},
    "Get something to start with": {"fetch": "evaluate.fetch", "draft": "draft.draft"},
}
NAMES = tuple(name for commands in _COMMANDS.values() for name in commands)


def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 (read in main)
) -> None:
    if version:
        typer.echo(f"wise {__version__}")
        raise typer.Exit


def program(names: Collection[str] = NAMES, *, outlined: bool = False) -> typer.Typer:
    """Return the command line with some of its commands; ``outlined``, with what their list says and no options."""
    from wisecli.cli.parameters import PanelledCommand, PanelledGroup

    found = typer.Typer(
        name="wise",
        cls=PanelledGroup,
        help="Edit what a language model knows, without retraining it and without breaking the rest of what it knows.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    found.callback(invoke_without_command=True)(_version)
    for panel, commands in _COMMANDS.items():
        for name, target in commands.items():
            if name in names:
                module, _, function = target.partition(".")
                command = getattr(import_module(f"wisecli.cli.commands.{module}"), function)
                found.command(name, cls=PanelledCommand, rich_help_panel=panel)(
                    _outline(command) if outlined else command
                )
    return found


def _outline(command: Callable[..., None]) -> Callable[[], None]:
    """Return a command without its options, which take longer to build than the rest of the list of commands."""

    def outline() -> None:
        raise AssertionError("no command is run by its outline")

    outline.__doc__ = command.__doc__
    return outline


def _asked_for() -> typer.Typer:
    """Return the program with the one command that is run, or with a list of all."""
    if "_WISE_COMPLETE" in os.environ:
        return program()
    named = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return program([named]) if named in NAMES else program(outlined=True)


def main() -> None:
    """Run the command line; every error the user can act on ends in one sentence and its exit code."""
    debug = "--debug" in sys.argv[1:2]
    _collect_less_often()
    quiet_libraries()
    show_all_letters()
    if "_WISE_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "1000"  # a description on two lines would be two proposals to fish
    try:
        code = _asked_for()(prog_name="wise", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except WiseError as error:
        if debug:
            raise
        fail(str(error), error.details)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        sys.exit(_failed(error))
    if code == _INTERRUPTED:  # Typer catches most interruptions, and says nothing of them
        fail("interrupted; nothing was written")
    sys.exit(code if isinstance(code, int) else 0)


def _collect_less_often() -> None:
    """Make the garbage collector look for cycles less often, and not at all when the process ends.

    Going through what torch and transformers import takes it seconds, and none of that is ever garbage.
    """
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)


def _failed(error: Exception) -> int:
    """Print an error that is no :class:`WiseError` (of usage, of the system, or a fault here); return the exit code."""
    if isinstance(error, OSError):  # of a disk, a device or a limit
        where = error.filename or "standard output"
        fail(f"{where}: {error.strerror or error}; make room or choose another place")
        _drop_output()
    elif not hasattr(error, "format_message"):
        fail(f"{type(error).__name__}: {error}; this is a fault in wise, `wise --debug ...` shows where")
    elif type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
    else:
        context = getattr(error, "ctx", None)
        path = "wise" if context is None else context.command_path
        fail(f"{error.format_message().rstrip('.')}; `{path} --help` says what there is")
    return 2


def _drop_output() -> None:
    """Discard what is still to be written on stdout, which Python would try to write, and complain of, when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
