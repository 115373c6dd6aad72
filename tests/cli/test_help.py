"""The help on a terminal of 80 columns: panels, and columns in which sentences can be read."""

import re
from functools import cache
from statistics import mean
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from wisecli.cli.app import program
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings

WIDTH = 80
PROGRAM = program()
COMMANDS: dict[str, Any] = typer.main.get_command(PROGRAM).commands  # type: ignore[attr-defined]
MANY = 9
SETTINGS = {"edit": EditSettings, "merge": MergeSettings, "eval": EvalSettings, "bench": BenchSettings}


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", WIDTH)
    monkeypatch.setenv("NO_COLOR", "1")


@cache
def lines_of(*command: str) -> list[str]:
    return CliRunner().invoke(PROGRAM, [*command, "--help"], prog_name="wise").stdout.splitlines()


def panels_of(*command: str) -> dict[str, list[str]]:
    """Titles of the panels and the lines in them."""
    panels: dict[str, list[str]] = {}
    for line in lines_of(*command):
        if line.startswith("╭─"):
            title = line.strip("╭─╮ ")
            panels[title] = []
        elif line.startswith("│"):
            panels[title].append(line)
    return panels


def parameters_of(command: str) -> dict[str, Any]:
    """The parameters that the help shows, by the name at which their row begins."""
    one = COMMANDS[command]
    parameters = one.get_params(typer.Context(one))
    return {
        next((name for name in parameter.opts if name.startswith("--")), parameter.name): parameter
        for parameter in parameters
        if not getattr(parameter, "hidden", False)
    }


def begin_of(rows: list[str], parameters: dict[str, Any]) -> int:
    """The column at which the help texts of a panel begin."""
    begins = set()
    for row in rows:
        name = row.strip("│* ").partition(" ")[0].partition(",")[0].removesuffix("...")
        # Further right a text goes on, perhaps with an option's name.
        if row[2:8].strip() and name in parameters:
            first = Text.from_markup(parameters[name].help).plain.split()[0]
            begins.add(row.index(f" {first} ", row.index(name)) + 1)
    (begin,) = begins
    return begin


def texts_of(command: str) -> list[tuple[int, list[str]]]:
    """Of each panel how wide its column of help texts is, and that column's lines."""
    parameters = parameters_of(command)
    found = []
    for rows in panels_of(command).values():
        begin, end = begin_of(rows, parameters), WIDTH - 2
        found.append((end - begin, [row[begin:end].strip() for row in rows]))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_no_column_of_help_texts_is_narrow(command: str) -> None:
    assert all(len(line) <= WIDTH for line in lines_of(command))
    assert min(width for width, _ in texts_of(command)) >= 32


@pytest.mark.parametrize("command", ["edit", "merge"])
def test_lines_of_help_texts_are_long_enough_to_read(command: str) -> None:
    lines = [line for _, column in texts_of(command) for line in column if line]
    assert mean(map(len, lines)) >= 35


@pytest.mark.parametrize("command", COMMANDS)
def test_many_options_stand_in_panels_and_few_in_one(command: str) -> None:
    options = [name for name in parameters_of(command) if name.startswith("--") and name != "--help"]
    titles = [title for title in panels_of(command) if title != "Arguments"]
    if len(options) < MANY:
        assert titles == ["Options"]
    else:
        assert titles[0] == "Most used"
        assert len(titles) > 2
        assert titles[-1] == "Output"


def test_the_panels_of_edit() -> None:
    panels = panels_of("edit")
    names = ("Most used", "Input", "Into a memory", "What is trained", "Where it runs", "Output")
    assert list(panels) == ["Arguments", *names]
    used = [line.split()[1] for line in panels["Most used"] if "--" in line.split()[1]]
    assert used == ["--output", "--into", "--device", "--dry-run", "--json", "--help"]


def test_the_panels_of_all_commands_and_their_order() -> None:
    panels = {title: [row.split()[1] for row in rows if row[2] != " "] for title, rows in panels_of().items()}
    del panels["Options"]
    assert list(panels.values()) == [
        ["edit", "merge", "eval", "export"],
        ["generate", "explain", "inspect", "verify", "check", "diff", "log"],
        ["remove", "rollback"],
        ["bench", "settings"],
        ["fetch", "draft"],
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help(command: str) -> None:
    shown = " ".join(line.strip("│ ") for line in lines_of(command))
    for name in parameters_of(command):
        assert name in shown


@pytest.mark.parametrize("command", SETTINGS)
def test_the_help_names_every_choice_of_a_setting(command: str) -> None:
    for name, parameter in parameters_of(command).items():
        if not name.startswith("--"):
            continue
        with typer.Context(COMMANDS[command]) as context:
            choices = [one.value for one in parameter.shell_complete(context, "")]
        # Of forms, kinds, datasets and methods of `wise bench`, and settings the error of a wrong name has the list.
        if name not in ("--methods", "--forms", "--kinds", "--set") and (command, name) != ("bench", "--dataset"):
            assert [choice for choice in choices if choice not in parameter.help] == []


@pytest.mark.parametrize("command", SETTINGS)
def test_a_default_in_the_help_is_that_of_the_settings(command: str) -> None:
    settings = SETTINGS[command]()
    for name in parameters_of(command).values():
        value = getattr(settings, name.name, None)
        if name.param_type_name == "option" and value is not None:
            told = re.escape(str(value).lower())
            assert re.search(rf"\[default: {told}(; [^]]+)?\]$", Text.from_markup(name.help).plain)
