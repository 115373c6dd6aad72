"""Fields of untrusted records, each checked; every error names the field."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wisecli.edits.text import is_plain, is_visible
from wisecli.io.json_schema import CLOSED, require_moment, shown

LONGEST_ID = 200
# A tag such as `de` or `pt-BR`; figures are named after it.
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt with an answer that is measured, never trained."""

    __pydantic_config__ = CLOSED

    prompt: str
    answer: str


@dataclass(frozen=True)
class Translation:
    """An edit's prompt and target in another language, which is named as the record names it."""

    __pydantic_config__ = CLOSED

    language: str
    prompt: str
    target: str


def id_of(value: Any, name: str = "id") -> str:
    """Return an id as it is named in reports and logs.

    Raises:
        ValueError: it is too long, or cannot be seen.
    """
    text = str(value)
    if len(text) > LONGEST_ID:
        raise ValueError(f"`{name}` must have {LONGEST_ID} characters at most, not {len(text)}")
    if not is_visible(text) or not all(map(is_plain, text)):
        raise ValueError(f"`{name}` must be a name that can be seen, without control characters, not {shown(text)}")
    return text


def text_in(fields: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """Return a text, if it is there.

    Args:
        where: what the fields are of, as ``also[0].``.

    Raises:
        ValueError: it is something else.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{where}{name}` must be a text, not {shown(value)}")
    return value


def time_in(fields: Mapping[str, Any], name: str) -> str | None:
    """Return a date or time as it is written, if it is there.

    Raises:
        ValueError: it is none.
    """
    when = text_in(fields, name)
    if when is not None:
        require_moment(when, name)
    return when


def texts_in(fields: Mapping[str, Any], name: str, where: str = "") -> tuple[str, ...]:
    """Return texts, none of them empty.

    Raises:
        ValueError: it is no list of such.
    """
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"`{where}{name}` must be a list of non-empty texts, not {shown(value)}")
    return tuple(value)


def evaluation_prompts_in(fields: Mapping[str, Any], name: str) -> tuple[EvaluationPrompt, ...]:
    """Return prompts with their answers.

    Raises:
        ValueError: they are no list of such.
    """
    value = fields.get(name) or []
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of objects with `prompt` and `answer`, not {shown(value)}")
    probes = []
    for item in value:
        prompt, answer = (item.get("prompt"), item.get("answer")) if isinstance(item, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt.strip() or not answer.strip():
            raise ValueError(f"`{name}` must hold objects with the texts `prompt` and `answer`, not {shown(item)}")
        probes.append(EvaluationPrompt(prompt, answer))
    return tuple(probes)


def translations_in(value: Any) -> tuple[Translation, ...]:
    """Return those of a record, by language, or in the form in which manifests list them.

    Raises:
        ValueError: they are neither, or a language is none.
    """
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {str(item.get("language")): item for item in value}
    if not isinstance(value, dict):
        raise ValueError(f"`translations` must be an object with a language's name for each, not {shown(value)}")
    found = []
    for language, item in sorted(value.items()):
        if not _LANGUAGE.fullmatch(language):
            raise ValueError(f"`translations` must have languages as `de` or `pt-BR`, not {shown(language)}")
        prompt, target = (item.get("prompt"), item.get("target")) if isinstance(item, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(target, str) or not prompt.strip() or not target.strip():
            raise ValueError(f"`translations` must hold objects with `prompt` and `target`, not {shown(item)}")
        found.append(Translation(language, prompt, target))
    return tuple(found)
