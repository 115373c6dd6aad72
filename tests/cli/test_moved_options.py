"""Options that went: the same command line with ``--set`` in their place, and a warning."""

from dataclasses import fields

import pytest

from wisecli.cli.moved_options import MOVED, taken_as_settings
from wisecli.cli.setting_options import settings_in
from wisecli.cli.setting_table import KINDS


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("m e --mask-ratio .3", "m e --set mask_ratio=.3"),
        ("m e --mask-ratio=.3 -q", "m e --set mask_ratio=.3 -q"),
        ("m e --no-forms --force", "m e --set in_forms=false --force"),
        ("--only 3/8 m e", "--set only=3/8 m e"),
        ("m e -- --only", "m e -- --only"),
        ("m e --layer 3", "m e --layer 3"),
    ],
)
def test_an_option_that_went_is_a_setting(line: str, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert taken_as_settings("edit", line.split()) == taken.split()
    warned = capsys.readouterr().err
    assert ("will go: write --set" in warned) == (line != taken)


def test_it_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert taken_as_settings("bench", ["--layers", "3", "--layers", "4"]) == [
        *("--set", "layers=3"),
        *("--set", "layers=4"),
    ]
    assert capsys.readouterr().err == "warning: --layers will go: write --set layers=3\n"


def test_a_command_without_any_is_left_as_it_is() -> None:
    assert taken_as_settings("export", ["--lambda", "3"]) == ["--lambda", "3"]


@pytest.mark.parametrize("command", MOVED)
def test_each_is_a_setting_of_its_command(command: str) -> None:
    known = {field.name for kind in KINDS[command] for field in fields(kind)}
    for text in MOVED[command].values():
        name, _, value = text.partition("=")
        assert name in known
        if value:
            settings_in(command, [text])
