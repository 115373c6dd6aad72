"""Prompts in a model's chat template, which may ask what day it is: it is one day for a whole run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any

from wisecli.errors import ModelError, SettingsError, reason_of
from wisecli.io.digest import sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wisecli.routing.deciding.prompt_window import TurnMarks


# Where a tokenizer keeps the day that its template is told, and what sets the day of a reproducible build.
_KEPT, _EPOCH = "wise_date", "SOURCE_DATE_EPOCH"
# What templates call for the time. Values for templates are plain data, so what answers in its place is a macro, which
# replaces what a format may have in it; `%%` first and last, so that it is no part of another.
_ASKS, _DAY = "strftime_now", "wise_day"
_ANSWER = (
    "{%- macro " + _ASKS + "(format) -%}{%- set told = namespace(text=format) -%}"
    "{%- for written, meant in "
    + _DAY
    + " -%}{%- set told.text = told.text | replace(written, meant) -%}{%- endfor -%}"
    "{{- told.text -}}{%- endmacro -%}{{- '' }}"
)
_PADDED, _OTHERS, _PERCENT = "dmyHIMSj", "aAwbBYpfzZUWcxXGuVeklFTDRCh", "\0"


def today() -> str:
    """Return the day that a run begins on: that of ``SOURCE_DATE_EPOCH`` where it is set, else the machine's.

    Raises:
        SettingsError: the variable is no number of seconds.
    """
    seconds = os.environ.get(_EPOCH)
    if seconds is None:
        return date.today().isoformat()
    try:
        return datetime.fromtimestamp(int(seconds), timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):
        raise SettingsError(f"{_EPOCH} must be seconds since 1970, not {seconds!r}; set it anew or unset it") from None


def fix_date(tokenizer: PreTrainedTokenizerBase, day: str | None = None) -> None:
    """Give the template one date from now on, at its midnight, whenever it asks; by default today.

    Raises:
        SettingsError: it is no day.
    """
    try:
        setattr(tokenizer, _KEPT, date.fromisoformat(day or today()).isoformat())
    except ValueError:
        raise SettingsError(f"{day!r} is no day as 2026-11-20") from None


def date_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the date that a template is given."""
    return str(getattr(tokenizer, _KEPT, None) or today())


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of how a chat is written, the day included; None without a template, or with one that fails.

    Whatever is learned from chats and kept for other runs goes by it.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return sha256_text(_chat(tokenizer, [("user", "a"), ("assistant", "b"), ("user", "c")]))
    except ModelError:
        return None


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as the user's turn in the model's chat template, up to where the answer begins.

    Raises:
        ModelError: the tokenizer has no chat template, or one that fails.
    """
    return chat_turns(tokenizer, [("user", prompt)])


def chat_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """Return the turns of a chat, by role and text, in the model's chat template, up to where the next answer begins.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model's tokenizer has no chat template; leave out --chat")
    return _chat(tokenizer, turns)


def few_shot_prompt(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]], asked: str) -> str:
    """Return a request after examples of requests and replies, up to where the reply begins.

    In the model's chat template, or without one as paragraphs, two a turn.
    """
    if not tokenizer.chat_template:
        return "".join(f"{request}\n{reply}\n\n" for request, reply in examples) + f"{asked}\n"
    turns = [(role, text) for pair in examples for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _chat(tokenizer, [*turns, ("user", asked)])


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> TurnMarks:
    """Return the tokens by which a chat template marks turns; special ones alone, if it opens none for answers."""
    from wisecli.routing.deciding.prompt_window import TurnMarks  # with torch, which texts do without

    special = special_ids(tokenizer)
    return TurnMarks(*_opener(tokenizer, set(special)), tuple(special))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's special tokens, ascending."""
    # What stands for words that the tokenizer does not know is a word.
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def _opener(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how an assistant's turn starts, and the special tokens in it that no bare text starts with."""
    if not tokenizer.chat_template:
        return (), ()
    asked = [{"role": "user", "content": "a"}]
    try:
        closed, opened = (
            tokenizer(_rendered(tokenizer, asked, opens=opens), add_special_tokens=False)["input_ids"]
            for opens in (False, True)
        )
    except Exception:  # a template is a program of the model's; whoever asks in a chat is told of it
        return (), ()
    if opened[: len(closed)] != closed:
        return (), ()
    opener = tuple(opened[len(closed) :])
    return opener, tuple(sorted((set(opener) & special) - set(tokenizer("a")["input_ids"])))


def _chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """Return a chat's turns, by role and text, and the next one's opening, without what the tokenizer puts first."""
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = _rendered(tokenizer, messages, opens=True)
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        raise ModelError(
            f"the model's chat template cannot be used ({reason_of(error)}); mend it, or leave out --chat"
        ) from error
    opening = tokenizer.bos_token
    added = bool(opening) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(opening)) if added else text


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, opens: bool) -> str:
    """Return turns in the model's chat template, with the opening of the assistant's next one if it ``opens`` that."""
    clock = _clock(str(tokenizer.get_chat_template()), date_of(tokenizer))
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opens, **clock))


def _clock(template: str, day: str) -> dict[str, Any]:
    """Return the arguments that give a date's midnight to a template that asks for the time; none for any other."""
    if _ASKS not in template:
        return {}
    midnight = datetime.fromisoformat(day)
    directives = [*(f"%-{letter}" for letter in _PADDED), *(f"%{letter}" for letter in _PADDED + _OTHERS)]
    values = [[written, midnight.strftime(written)] for written in directives]
    # Blanks in front of a first statement are no text; after another they would be.
    start = template.lstrip(" \t")
    whole = _ANSWER + (start if start.startswith("{%") else template)
    return {"chat_template": whole, _DAY: [["%%", _PERCENT], *values, [_PERCENT, "%"]]}
