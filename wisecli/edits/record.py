"""The edit record, and records of files → edits; every complaint names the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wisecli.edits.files import content_of, record_in, records_of
from wisecli.edits.formats import canonical, misspelt, unknown_fields
from wisecli.edits.text import is_plain, is_visible
from wisecli.errors import EditFileError
from wisecli.io.digest import sha256_json
from wisecli.io.json_schema import CLOSED, decode, require_moment, require_sane, shown

OPERATIONS = ("insert", "modify", "erase")
PROVENANCE = ("who", "when", "source")
_LONGEST_ID = 200
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


@dataclass(frozen=True)
class Edit:
    """One fact to change, and what is measured about it.

    ``rephrases``, ``locality``, ``portability`` and ``ood`` (a free text about the same fact) are for evaluation only;
    ``irrelevant`` trains and calibrates the router; ``translations`` are trained, too, each with its own target.
    ``who``, ``when`` (ISO 8601) and ``source`` say where the fact is from; nothing goes by them. Of op ``erase`` the
    ``target`` is what the model should no longer say, and ``replacement``, if there is one, what it should say instead.
    """

    __pydantic_config__ = CLOSED

    id: str
    prompt: str
    target: str
    op: str = "modify"
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[EvaluationPrompt, ...] = ()
    portability: tuple[EvaluationPrompt, ...] = ()
    irrelevant: tuple[str, ...] = ()
    ood: tuple[str, ...] = ()
    translations: tuple[Translation, ...] = ()
    who: str | None = None
    when: str | None = None
    source: str | None = None
    replacement: str | None = None

    @property
    def erased(self) -> bool:
        """Whether nothing takes the place of what is erased: the model should just not say the ``answer``."""
        return self.op == "erase" and self.replacement is None

    @property
    def answer(self) -> str:
        """What the model should say, or if it is ``erased`` should not."""
        return self.target if self.replacement is None else self.replacement

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as the manifests keep it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Edit:
        """The inverse of :meth:`as_dict`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong kind.
        """
        return decode(cls, dict(record))


# An edit with its line, or its place in a JSON array or a table.
Numbered = tuple[int, Edit]


def read_edits(path: Path, *, limit: int | None = None) -> list[Edit]:
    """Read and check a whole file of edits.

    Args:
        path: JSONL (one object a line), a JSON array, or a Parquet table, in any layout of
            :mod:`wisecli.edits.formats`.
        limit: keep only the first so many.

    Raises:
        EditFileError: naming the line, if a record is malformed, incomplete or there twice.
    """
    return [edit for _, edit in numbered_edits(path, content_of(path))][:limit]


def numbered_edits(
    path: Path, content: bytes, *, passed_over: Callable[[int, str, str | None], None] = lambda *_: None
) -> list[Numbered]:
    """Parse and check the content of a file of edits.

    Args:
        path: where it is from; ``.parquet`` makes it a table.
        passed_over: told of every field that nothing reads: its line, its name, and the known name that it is like.

    Raises:
        EditFileError: naming the line, if a record is malformed, incomplete or there twice.
    """
    edits: list[Numbered] = []
    seen: dict[str, int] = {}
    for line, record in records_of(path, content):
        try:
            edit = parse_edit(record)
        except ValueError as error:
            raise EditFileError(path, str(error), line=line) from None
        if edit.id in seen:
            raise EditFileError(
                path, f"edit {edit.id!r} is already at {seen[edit.id]}; remove one or change its id", line=line
            )
        for name, meant in unknown_fields(record).items():
            passed_over(line, name, meant)
        seen[edit.id] = line
        edits.append((line, edit))
    if not edits:
        raise EditFileError(path, "there is no edit in it; write one JSON object with `prompt` and `target` a line")
    return edits


def parse_line(path: Path, number: int, line: bytes) -> Edit:
    """The edit that one line of a file holds.

    Raises:
        EditFileError: naming the line, if it holds none.
    """
    try:
        return parse_edit(record_in(path, number, line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise EditFileError(path, f"not readable as UTF-8 text ({error}); save it as UTF-8", line=number) from None
    except ValueError as error:
        raise EditFileError(path, str(error), line=number) from None


def parse_edit(record: Mapping[str, Any]) -> Edit:
    """Turn a record in any known layout into an edit.

    Raises:
        ValueError: saying what is missing or of the wrong kind.
    """
    require_sane(record)
    if (found := misspelt(record)) is not None:
        raise ValueError(f"{shown(found[0])} is unknown; did you mean `{found[1]}`?")
    try:
        fields = canonical(record)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a field is of the wrong kind ({error})") from None
    for name in ("prompt", "target"):
        value = fields.get(name)
        if value is None:
            raise ValueError(f"`{name}` is missing; every edit needs `prompt` and `target`")
        if not isinstance(value, str) or not is_visible(value):
            raise ValueError(f"`{name}` must be a non-empty text, not {shown(value)}")
    operation = fields.get("op") or "modify"
    if operation not in OPERATIONS:
        raise ValueError(f"`op` must be one of {', '.join(OPERATIONS)}, not {shown(operation)}")
    replacement = _text(fields, "replacement")
    if replacement is not None and operation != "erase":
        raise ValueError(f"`replacement` goes with the op `erase` alone, not with {operation}; give it as `target`")
    if replacement is not None and not is_visible(replacement):
        raise ValueError(f"`replacement` must be a non-empty text, not {shown(replacement)}")
    return Edit(
        id=_id(fields["id"]) if fields.get("id") is not None else _digest(record),
        prompt=fields["prompt"],
        target=fields["target"],
        op=operation,
        subject=_text(fields, "subject"),
        rephrases=_texts(fields, "rephrases"),
        locality=_evaluation_prompts(fields, "locality"),
        portability=_evaluation_prompts(fields, "portability"),
        irrelevant=_texts(fields, "irrelevant"),
        ood=_texts(fields, "ood"),
        who=_text(fields, "who"),
        when=_when(fields),
        source=_text(fields, "source"),
        replacement=replacement,
        translations=_translations(fields.get("translations") or {}),
    )


def _id(value: Any) -> str:
    """An id as it is named in reports and logs."""
    text = str(value)
    if len(text) > _LONGEST_ID:
        raise ValueError(f"`id` must have {_LONGEST_ID} characters at most, not {len(text)}")
    if not is_visible(text) or not all(map(is_plain, text)):
        raise ValueError(f"`id` must be a name that can be seen, without control characters, not {shown(text)}")
    return text


def _digest(record: Mapping[str, Any]) -> str:
    """An id by what is to change, whoever says so."""
    return sha256_json({name: value for name, value in record.items() if name not in PROVENANCE})[:16]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, not {shown(value)}")
    return value


def _when(fields: Mapping[str, Any]) -> str | None:
    when = _text(fields, "when")
    if when is not None:
        require_moment(when, "when")
    return when


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"`{name}` must be a list of non-empty texts, not {shown(value)}")
    return tuple(value)


def _evaluation_prompts(fields: Mapping[str, Any], name: str) -> tuple[EvaluationPrompt, ...]:
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


def _translations(value: Any) -> tuple[Translation, ...]:
    """Those of a record, by language, or in the form in which manifests list them."""
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
