"""How commands declare their parameters: the help text, the panel it stands in, and what the shell completes."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from wisecli.cli.choices import Completer, one_of
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings, defaults

# Panels of the help, in the order in which the commands declare their options. Options that name none of them stand
# in a panel of their own above the others, with those that most people need.
INPUT = "Input"
INTO = "Into a memory"
PROMPTS = "Prompts"
TRAINED = "What is trained"
MERGED = "How shards are merged"
MEASURED = "What is measured"
STUDIED = "Studies"
ANSWERS = "Answers"
WEIGHTS = "Weights"
ROUTER = "Router"
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
# What stands for a value in the help, by its type.
_METAVARS: dict[Any, str] = {bool: "", int: "N", float: "X"}


class PanelledCommand(TyperCommand):
    """A command whose many options stand in panels; if they are few, they stand in one."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, arranged for the help."""
        return _arranged(super().get_params(ctx))


class PanelledGroup(TyperGroup):
    """The commands; their own options are arranged as a command's are."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, arranged for the help."""
        return _arranged(super().get_params(ctx))


def _arranged(parameters: list[Any]) -> list[Any]:
    """The parameters, those too that Typer adds, each option in its panel, and no type beside flags."""
    options = [one for one in parameters if one.param_type_name == "option"]
    many = len([one for one in options if "--help" not in one.opts]) >= _MANY
    for one in options:
        one.rich_help_panel = (getattr(one, "rich_help_panel", None) or _MOST_USED) if many else None
        one.metavar = "" if one.is_flag else one.metavar
    return parameters


def option(
    text: str,
    *names: str,
    panel: str | None = None,
    default: str = "",
    metavar: str = "TEXT",
    complete: Completer | None = None,
    least: float | None = None,
) -> Any:
    """An option that takes a value.

    Args:
        text: what it is for.
        names: its names, if not the parameter's own.
        panel: where in the help it stands; without one with those that most people need.
        default: what the help says of its default.
        metavar: what stands for the value in the help.
        complete: what the shell proposes, if not files.
        least: its least number.
    """
    if default:
        # One text with its default runs on over its lines; Typer's own default would begin a new one.
        text = f"{escape(text)} [dim]{escape(f'[default: {default}]')}[/dim]"
    return typer.Option(
        *names,
        help=text,
        show_default=False,
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=complete,
        min=least,
    )


def flag(text: str, *names: str, panel: str | None = None, default: str = "") -> Any:
    """An option without a value."""
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
    """An option for a setting: its default is the settings class's own, or what ``none`` says it stands for.

    The shell completes what the class allows.
    """
    default = defaults(kind)[name]
    bare = _bare(_HINTS[kind][name])
    allowed = get_args(bare) if get_origin(bare) is Literal else ()
    return option(
        text,
        *names,
        panel=panel,
        default=none if default is None else str(default).lower(),
        metavar=metavar or _METAVARS.get(bare, "NAME" if allowed or complete else "TEXT"),
        complete=complete or (one_of(allowed) if allowed else None),
    )


def _bare(hint: Any) -> Any:
    """A setting's type without its bounds, and without that there may be none."""
    while get_origin(hint) in (Annotated, Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    return hint
