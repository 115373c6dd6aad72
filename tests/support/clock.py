"""Days that tests go through, and a template that says something else on each."""

from pathlib import Path

import pytest

from support.helpers import rewrite

# Every second day begins with another word; the tiny models know both.
CLOCK_TEMPLATE = "{{ 'mu mi' if strftime_now('%d')|int is even else 'zo zu' }} {{ messages[-1].content }}"


def set_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Let it be a day, from midnight on."""
    import datetime

    seconds = datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(seconds)))


def with_clock(model: Path) -> Path:
    """Give a saved model a chat template that asks what day it is."""
    rewrite(model / "tokenizer_config.json", chat_template=CLOCK_TEMPLATE)
    return model
