"""How commands declare their parameters: the help text, the panel it stands in, and what the shell completes."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from wisecli.cli.choices import Completer, one_of
from wisecli.cli.moved_options import taken_as_settings
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings, defaults
from wisecli.errors import SettingsError
from wisecli.validated_settings import unwrapped

# Panels of the help, in the order in which the commands declare their options. Options that name none of them stand
# in a panel of their own above the others, with those that most people need.
INPUT = "Input"
INTO = "Into a memory"
TRAINED = "What is trained"
MERGED = "How shards are merged"
MEASURED = "What is measured"
STUDIED = "Studies"
ANSWERS = "Answers"
WEIGHTS = "Weights"
WHERE = "Where it runs"
HUB = "Model card and hub"
OUTPUT = "Output"
_MOST_USED = "Most used"
# Fewer options than this stand in one panel.
_MANY = 9

# Types of the settings, worked out once.
_HINTS: dict[Any, dict[str, Any]] = {
    kind: get_type_hints(kind) for kind in (EditSettings, MergeSettings, EvalSettings, BenchSettings)
}
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}
# What stands for a value in the help, by its type.
_METAVARS: dict[Any, str] = {bool: "", int: "N", float: "X"}


# How the help shows that an option may stand alone, which is to say `always`, or have a value after `=`.
BARE = "[="


class PanelledCommand(TyperCommand):
    """A command whose many options stand in panels; if they are few, they stand in one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line, on which options with a value for the asking may stand alone."""
        alone = {name for param in self.params if str(param.metavar).startswith(BARE) for name in param.opts}
        args = [f"{arg}=always" if arg in alone else arg for arg in args]
        found: list[str] = super().parse_args(ctx, taken_as_settings(self.name or "", args))
        return found

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, arranged for the help."""
        return _arranged(super().get_params(ctx))


class PanelledGroup(TyperGroup):
    """The commands; their own options are arranged as a command's are."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, arranged for the help."""
        return _arranged(super().get_params(ctx))


def _arranged(parameters: list[Any]) -> list[Any]:
    """Return the parameters, those too that Typer adds, each option in its panel, and no type beside flags."""
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    many = len([parameter for parameter in options if "--help" not in parameter.opts]) >= _MANY
    for parameter in options:
        parameter.rich_help_panel = (getattr(parameter, "rich_help_panel", None) or _MOST_USED) if many else None
        parameter.metavar = "" if parameter.is_flag else parameter.metavar
    for parameter in parameters:
        if hasattr(parameter, "type_descriptor"):
            _read_at_once(parameter)
    return parameters


def _read_at_once(parameter: Any) -> None:
    """Read plain values of a parameter without what newer Typers build for every parameter, by pydantic.

    To import that takes longer than all else that a refusal needs. What it would refuse is left to it.
    """
    kind, info = parameter.type_descriptor.annotation, parameter.type_descriptor.parameter_info
    many, by_typer = parameter.multiple or parameter.nargs != 1, parameter.process_value
    one_kind = get_args(kind)[0] if many and get_origin(kind) is list else kind

    def process(ctx: Any, value: Any) -> Any:
        if value is None or (many and not value):
            if parameter.required:
                return by_typer(ctx, value)
            found: Any = () if many else None
        elif info.parser is not None and isinstance(value, str):
            found = info.parser(value)
        else:
            try:
                read = [_read(one_kind, part) for part in (value if many else [value])]
            except ValueError as error:
                raise SettingsError(f"{parameter.opts[0]} {error}") from None
            if None in read or not read or not (info.min is None or all(part >= info.min for part in read)):
                return by_typer(ctx, value)
            found = read if many else read[0]
        return found if parameter.callback is None else parameter.callback(ctx, parameter, found)

    parameter.process_value = process


def _read(kind: Any, value: Any) -> Any:
    """Return a value in its type, or ``None`` if it takes a closer look.

    Raises:
        ValueError: it is no number, where one is wanted.
    """
    if isinstance(kind, type) and type(value) is kind:
        return value
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind not in _KINDS or not isinstance(value, str):
        return None
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"must be {_KINDS[kind]}, not {value!r}") from None


def option(
    text: str,
    *names: str,
    panel: str | None = None,
    default: str = "",
    metavar: str = "TEXT",
    complete: Completer | None = None,
    minimum: float | None = None,
) -> Any:
    """Return an option that takes a value.

    Args:
        text: what it is for.
        names: its names, if not the parameter's own.
        panel: where in the help it stands; without one with those that most people need.
        default: what the help says of its default.
        metavar: what stands for the value in the help.
        complete: what the shell proposes, if not files.
        minimum: its least number.
    """
    if default:
        # One text with its default runs on over its lines; Typer's own default would begin a new one.
        text = f"{_escaped(text)} [dim]{_escaped(f'[default: {default}]')}[/dim]"
    return typer.Option(
        *names,
        help=text,
        show_default=False,
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=complete,
        min=minimum,
    )


def _escaped(text: str) -> str:
    """Return a text without Rich's markup. Rich's own function takes as long to import as all commands."""
    return text.replace("[", r"\[")


def flag(text: str, *names: str, panel: str | None = None, default: str = "") -> Any:
    """Return an option without a value."""
    return option(text, *names, panel=panel, default=default, metavar="")


def setting(
    kind: type[Any],
    name: str,
    text: str,
    *names: str,
    panel: str | None = None,
    none: str = "",
    metavar: str = "",
    complete: Completer | None = None,
) -> Any:
    """Return an option for a setting: its default is the settings class's own, or what ``none`` says it stands for.

    The shell completes what the class allows.
    """
    default = defaults(kind)[name]
    bare, _, _ = unwrapped(_HINTS[kind][name])
    allowed = get_args(bare) if get_origin(bare) is Literal else ()
    return option(
        text,
        *names,
        panel=panel,
        default=none if default is None else str(default).lower(),
        metavar=metavar or _METAVARS.get(bare, "NAME" if allowed or complete else "TEXT"),
        complete=complete or (one_of(allowed) if allowed else None),
    )
