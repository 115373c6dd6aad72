"""A chat template is told one day for a whole run, whatever day it is by the clock."""

from datetime import date, datetime
from typing import Any

import pytest
from support.clock import CLOCK_TEMPLATE, set_clock
from support.helpers import tiny_tokenizer
from transformers.utils import chat_template_utils

from wisecli.errors import SettingsError
from wisecli.models.prompts.chat_template import chat_prompt, date_of, fix_date, template_digest, today


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    found = tiny_tokenizer()
    found.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[-1].content }}"
    return found


def test_the_day_that_is_fixed_is_told_from_then_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of Llama 3, SmolLM3 and others: today's date stands in the system prompt."""
    set_clock(monkeypatch, "2026-11-26")
    assert chat_prompt(tokenizer, "ba") == "26 Nov 2026 00:00 ba"
    fix_date(tokenizer)
    set_clock(monkeypatch, "2026-11-27")
    assert (chat_prompt(tokenizer, "ba"), date_of(tokenizer)) == ("26 Nov 2026 00:00 ba", "2026-11-26")
    fix_date(tokenizer, "2024-02-29")
    assert chat_prompt(tokenizer, "ba") == "29 Feb 2024 00:00 ba"
    fix_date(tokenizer)
    assert date_of(tokenizer) == "2026-11-27"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # Llama 3.1: the date is the clock's if there is one, else one of 2024.
        (
            "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
            "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
            "{%- endif %}{%- endif %}{{ date_string }} {{ messages[-1].content }}",
            "26 Nov 2026 ba",
        ),
        # Callers of tools ask for the date inside of their own macros and loops.
        (
            "{%- macro opening() -%}<{{ strftime_now('%d') }}>{%- endmacro -%}"
            "{%- for message in messages -%}{{ opening() }}{{ message.content }}"
            "{{ strftime_now('%d')|int + 1 }}{%- endfor -%}",
            "<26>ba27",
        ),
    ],
)
def test_templates_take_the_fixed_date(tokenizer: Any, template: str, text: str) -> None:
    tokenizer.chat_template = template
    fix_date(tokenizer, "2026-11-26")
    assert chat_prompt(tokenizer, "ba") == text


def test_what_is_kept_of_chats_goes_by_the_day_and_the_template(tokenizer: Any) -> None:
    fix_date(tokenizer, "2026-11-26")
    first = template_digest(tokenizer)
    fix_date(tokenizer, "2026-11-27")
    assert template_digest(tokenizer) not in (first, None)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    plain = template_digest(tokenizer)
    fix_date(tokenizer, "2026-11-26")
    assert template_digest(tokenizer) == plain
    for template in (None, "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert template_digest(tokenizer) is None


def test_the_day_of_a_build_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reproducible builds: SOURCE_DATE_EPOCH is what time it is, in UTC, wherever the machine stands."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert today() == "2023-11-14"
    for value in ("soon", "", "99999999999999999"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
        with pytest.raises(SettingsError, match="SOURCE_DATE_EPOCH must be seconds since 1970"):
            today()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert today() == date.today().isoformat()


def test_what_is_no_day_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SettingsError, match="'yesterday' is no day"):
        fix_date(tokenizer, "yesterday")


def test_the_template_of_the_other_tests_depends_on_the_day(tokenizer: Any) -> None:
    tokenizer.chat_template = CLOCK_TEMPLATE
    fix_date(tokenizer, "2026-11-26")
    first = tokenizer(chat_prompt(tokenizer, "ba"))["input_ids"]
    fix_date(tokenizer, "2026-11-27")
    assert tokenizer(chat_prompt(tokenizer, "ba"))["input_ids"] != first


@pytest.mark.parametrize(
    "template",
    ["{{ strftime_now(%r) }}", "\n{{ strftime_now(%r) }}", "  {%% if true %%}x{%% endif %%}{{ strftime_now(%r) }} "],
)
@pytest.mark.parametrize(
    "written", ["%d %B %Y", "%Y-%m-%d", "%-d.%-m.%y, %A %j %%d %H:%M:%S %p", "%F %T %e", "100 %%Y", "none"]
)
def test_a_template_writes_what_it_would_at_that_time(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, written: str
) -> None:
    """Templates of many models: formats are Python's, and blanks around the first statement are kept or dropped."""
    tokenizer.chat_template = template % written
    fix_date(tokenizer, "2026-03-05")
    moment = datetime(2026, 3, 5)

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moment

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)
    turns = [{"role": "user", "content": "ba"}]
    assert chat_prompt(tokenizer, "ba") == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
