import json

import pytest

from wisecli.cli.console import Console, Table, fail, plain
from wisecli.progress import NOTE, Event

# What clears a screen, moves the cursor, turns text around, hides, rings, or fakes a line of its own.
STEERING = "a\x1b[2J\x9b1A\u202e\u200b\x07\r\nerror: b\x7f\ud800"


def steers(text: str) -> bool:
    return any(not one.isprintable() for one in text.replace("\n", "").replace("\u3000", ""))


def test_what_would_steer_a_terminal_is_spelt_out() -> None:
    shown = plain(STEERING)
    assert shown == r"a\x1b[2J\x9b1A\u202e\u200b\x07\r\nerror: b\x7f\ud800"
    assert plain("Ça va, 東京\u3000へ 👍🏽 می\u200cخواهم") == "Ça va, 東京\u3000へ 👍🏽 می\u200cخواهم"


def test_nothing_that_is_printed_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table((STEERING, "[red]b"), STEERING, right=("[red]b",))
    table.add(STEERING, "[bold]c[/bold]")
    console = Console()
    console.result({}, STEERING, table, "[link=x]d")
    console.warn([STEERING])
    fail(STEERING, (STEERING, STEERING))
    with console.watching() as watch:
        watch(Event(NOTE, note=STEERING))
        watch(Event("stage", 1, 1, STEERING))
    captured = capsys.readouterr()
    assert not steers(captured.out)
    assert not steers(captured.err)
    assert "[bold]c[/bold]" in captured.out
    assert "[link=x]d" in captured.out
    assert captured.err.count("\n") == 6


def test_json_says_the_same_and_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"id": STEERING.replace("\ud800", ""), "text": "東京 é\u3000\U000e0001"}
    Console(as_json=True).result(content, "not shown")
    shown = capsys.readouterr().out
    assert json.loads(shown) == content
    assert not steers(shown)
    assert "東京 é" in shown
