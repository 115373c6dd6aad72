"""The edit record, and records of files → edits; every complaint names the line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wisecli.edits.reading.field_names import canonical, unknown_fields
from wisecli.edits.reading.flatten_records import Notices, flattened
from wisecli.edits.reading.record_fields import (
    LONGEST_ID,
    EvaluationPrompt,
    Translation,
    evaluation_prompts_in,
    id_of,
    text_in,
    texts_in,
    time_in,
    translations_in,
)
from wisecli.edits.reading.record_files import content_of, record_in, records_of
from wisecli.edits.reading.subject_names import named_subject
from wisecli.edits.text import is_visible
from wisecli.errors import EditFileError
from wisecli.io.digest import sha256_json
from wisecli.io.json_schema import CLOSED, decode, shown

OPERATIONS = ("insert", "modify", "erase")
PROVENANCE = ("who", "when", "source")
# What a consequence may have, as a record states it.
_STATED = ("prompt", "target", "subject", "rephrases")


@dataclass(frozen=True)
class Edit:
    """One fact to change, and what is measured about it.

    ``rephrases``, ``locality``, ``portability`` and ``ood`` (a free text about the same fact) are for evaluation only;
    ``irrelevant`` trains and calibrates the router; ``translations`` are trained, too, each with its own target.
    ``who``, ``when`` (ISO 8601) and ``source`` say where the fact is from; nothing goes by them. Of op ``erase`` the
    ``target`` is what the model should no longer say, and ``replacement``, if there is one, what it should say instead.
    ``consequence_of`` is the id of the edit that this one follows from, if it does; ``derived`` names the rule by which
    it was found, where no record states it.
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
    consequence_of: str | None = None
    derived: str | None = None

    @property
    def subject_name(self) -> str | None:
        """The subject as it is stated, or else as the prompt names it; an empty one is none."""
        return named_subject(self.prompt) if self.subject is None else self.subject.strip() or None

    @property
    def erased(self) -> bool:
        """Whether nothing takes the place of what is erased: the model should just not say the ``answer``."""
        return self.op == "erase" and self.replacement is None

    @property
    def answer(self) -> str:
        """What the model should say, or if it is ``erased`` should not."""
        return self.target if self.replacement is None else self.replacement

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, as the manifests keep it."""
        nested = ("locality", "portability", "translations")
        return {**vars(self), **{name: tuple(map(asdict, getattr(self, name))) for name in nested}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Edit:
        """Return the inverse of :meth:`as_dict`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong kind.
        """
        return decode(cls, dict(record))


# An edit with its line, or its place in a JSON array or a table; its consequences have the same.
Numbered = tuple[int, Edit]


def consequences_in(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Return those edits that follow from others."""
    return tuple(edit for edit in edits if edit.consequence_of is not None)


def read_edits(path: Path, *, limit: int | None = None) -> list[Edit]:
    """Read and check a whole file of edits; return each, followed by its consequences.

    Args:
        path: JSONL (one object a line), a JSON array, or a table (Parquet, CSV, TSV), in any layout of
            :mod:`wisecli.edits.reading.field_names` and :mod:`wisecli.edits.reading.benchmark_layouts`.
        limit: how many records are read, from the first on; all by default.

    Raises:
        EditFileError: naming the line, if a record is malformed, incomplete or there twice.
    """
    numbered = numbered_edits(path, content_of(path))
    lines = set(list(dict.fromkeys(line for line, _ in numbered))[:limit])
    return [edit for line, edit in numbered if line in lines]


def numbered_edits(
    path: Path, content: bytes, *, notices: Notices | None = None, repeated: bool = False
) -> list[Numbered]:
    """Parse and check the content of a file of edits; return each, followed by its consequences.

    Args:
        path: where it is from; ``.parquet``, ``.csv`` and ``.tsv`` make it a table.
        notices: takes note of fields that nothing reads, of values that were no texts, and of layouts.
        repeated: whether an edit that was there before, word for word, is passed over.

    Raises:
        EditFileError: naming the line, if a record is malformed, incomplete or there twice.
    """
    edits: list[Numbered] = []
    seen: dict[str, tuple[int, Edit]] = {}
    notices = notices or Notices(str(path))
    for line, record in records_of(path, content):
        try:
            read = parse_edits(record, notices.at(line))
        except ValueError as error:
            raise EditFileError(path, str(error), line=line) from None
        for edit in read:
            first, same = seen.setdefault(edit.id, (line, edit))
            if edit is same:
                edits.append((line, edit))
            elif repeated and edit == same:
                notices.noted("the edit is there already, word for word, and was passed over")
            else:
                raise EditFileError(
                    path, f"edit {edit.id!r} is already at {first}; remove one or change its id", line=line
                )
    if not edits:
        raise EditFileError(path, "there is no edit in it; write one JSON object with `prompt` and `target` a line")
    return edits


def parse_line(path: Path, number: int, line: bytes) -> tuple[Edit, ...]:
    """Return the edit that one line of a file holds, followed by its consequences.

    Raises:
        EditFileError: naming the line, if it holds none.
    """
    try:
        return parse_edits(record_in(path, number, line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise EditFileError(path, f"not readable as UTF-8 text ({error}); save it as UTF-8", line=number) from None
    except ValueError as error:
        raise EditFileError(path, str(error), line=number) from None


def parse_edits(record: Mapping[str, Any], notices: Notices | None = None) -> tuple[Edit, ...]:
    """Return the edits of a record in any known layout, each followed by the consequences that it states.

    Args:
        notices: takes note of what was read how.

    Raises:
        ValueError: saying what is missing or of the wrong kind.
    """
    notices = notices or Notices("")
    flats = flattened(record, notices)
    found: list[Edit] = []
    for flat in flats:
        found += _with_consequences(flat, record if len(flats) == 1 else flat)
        for name, meant in unknown_fields(flat).items():
            notices.passed_over(name, meant)
    notices.took(len(found), found[0].prompt, found[0].target)
    return tuple(found)


def _with_consequences(flat: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[Edit, ...]:
    """Return a record's edit, followed by the consequences that it states."""
    edit = _edit(flat, record)
    stated = canonical(flat)["also"] or []
    if not isinstance(stated, list):
        raise ValueError(f"`also` must be a list of objects with `prompt` and `target`, not {shown(stated)}")
    if stated and edit.consequence_of is not None:
        raise ValueError("`also` is for edits, and this is a consequence; state it with the edit that it follows from")
    if len(edit.id) + len(consequence_id("", "also", len(stated))) > LONGEST_ID:
        raise ValueError("`id` is too long for consequences to be named after it; shorten it, or drop `also`")
    return edit, *(_consequence(edit, index, item) for index, item in enumerate(stated))


def consequence_id(edit: str, kind: str, number: int) -> str:
    """Return the id of an edit's consequence; each kind is numbered from 1."""
    return f"{edit}/{kind}-{number}"


def _consequence(edit: Edit, index: int, item: Any) -> Edit:
    """Return a stated consequence as an edit, with the author, time and source of the edit that states it."""
    where = f"also[{index}]"
    if not isinstance(item, dict):
        raise ValueError(f"`{where}` must be an object with `prompt` and `target`, not {shown(item)}")
    if (other := next((name for name in item if name not in _STATED), None)) is not None:
        raise ValueError(f"`{where}` has the unknown field {shown(other)}; leave it out, or use {', '.join(_STATED)}")
    for name in ("prompt", "target"):
        if item.get(name) is None:
            raise ValueError(f"`{where}.{name}` is missing; every consequence needs `prompt` and `target`")
        if not isinstance(item[name], str) or not is_visible(item[name]):
            raise ValueError(f"`{where}.{name}` must be a non-empty text, not {shown(item[name])}")
    return Edit(
        id=consequence_id(edit.id, "also", index + 1),
        prompt=item["prompt"],
        target=item["target"],
        subject=text_in(item, "subject", f"{where}."),
        rephrases=texts_in(item, "rephrases", f"{where}."),
        who=edit.who,
        when=edit.when,
        source=edit.source,
        consequence_of=edit.id,
    )


def parse_edit(record: Mapping[str, Any]) -> Edit:
    """Turn a record in any known layout into its edit, the first if it holds several.

    Raises:
        ValueError: saying what is missing or of the wrong kind.
    """
    flats = flattened(record, Notices(""))
    return _edit(flats[0], record if len(flats) == 1 else flats[0])


def _edit(flat: Mapping[str, Any], record: Mapping[str, Any]) -> Edit:
    """Return an edit from fields by known names; without an id its id is made from the ``record``."""
    try:
        fields = canonical(flat)
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
    replacement = text_in(fields, "replacement")
    if replacement is not None and operation != "erase":
        raise ValueError(f"`replacement` goes with the op `erase` alone, not with {operation}; give it as `target`")
    if replacement is not None and not is_visible(replacement):
        raise ValueError(f"`replacement` must be a non-empty text, not {shown(replacement)}")
    return Edit(
        id=id_of(fields["id"]) if fields.get("id") is not None else _digest(record),
        prompt=fields["prompt"],
        target=fields["target"],
        op=operation,
        subject=text_in(fields, "subject"),
        rephrases=texts_in(fields, "rephrases"),
        locality=evaluation_prompts_in(fields, "locality"),
        portability=evaluation_prompts_in(fields, "portability"),
        irrelevant=texts_in(fields, "irrelevant"),
        ood=texts_in(fields, "ood"),
        who=text_in(fields, "who"),
        when=time_in(fields, "when"),
        source=text_in(fields, "source"),
        replacement=replacement,
        translations=translations_in(fields.get("translations") or {}),
        consequence_of=_followed(fields),
        derived=text_in(fields, "derived"),
    )


def _followed(fields: Mapping[str, Any]) -> str | None:
    """Return the id of the edit that a record is a consequence of."""
    if fields.get("consequence_of") is not None:
        return id_of(fields["consequence_of"], "consequence_of")
    if fields.get("derived") is not None:
        raise ValueError("`derived` goes with `consequence_of` alone; name the edit that it follows from")
    return None


def _digest(record: Mapping[str, Any]) -> str:
    """Return an id from what is to change; source, author and consequences do not count."""
    kept = {name: value for name, value in record.items() if name not in (*PROVENANCE, "also")}
    return sha256_json(kept)[:16]
