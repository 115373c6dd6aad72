"""Layouts beyond renamed fields → records with the fields of :mod:`wisecli.edits.reading.field_names`.

A layout is known by fields that no other has. One record may hold several edits. Nothing here reads a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wisecli.edits.reading.chats import edit_of_chat
from wisecli.edits.reading.field_names import ALIASES
from wisecli.edits.reading.ripple_edits import edit_of_statement
from wisecli.io.json_schema import shown

Record = Mapping[str, Any]
Flat = dict[str, Any]

_BLANK = "{}"


@dataclass(frozen=True)
class Layout:
    """One layout: by which fields it is known, what is taken from which of them, and how.

    ``general`` ones are told by fields that a record of another layout may have as well: where a record has a target by
    any known name, they do not count.
    """

    name: str
    fields: tuple[str, ...]
    taken: str
    read: Callable[[Record], list[Flat]]
    general: bool = False
    kind: type | tuple[type, ...] = object

    def claims(self, record: Record) -> bool:
        """Return whether a record has the fields of this layout."""
        there = all(record.get(name) is not None for name in self.fields)
        return there and isinstance(record[self.fields[0]], self.kind)


# How a record is read that is of no layout here: by the names of its fields.
BY_NAME = Layout(
    "fields by name", (), "the fields that the documentation of edit records names", lambda record: [_named(record)]
)


def layout_of(record: Record) -> Layout:
    """Return the layout that a record is in.

    Raises:
        ValueError: it may be in two.
    """
    answered = next((name for name in ALIASES["target"] if record.get(name) is not None), None)
    found = [layout for layout in _LAYOUTS if layout.claims(record)]
    if answered is not None:
        talks = next((layout for layout in found if layout.read is edit_of_chat), None)
        if talks is not None:
            raise ValueError(f"`{talks.fields[0]}` and `{answered}` both say what the answer is; leave one of them out")
        found = [layout for layout in found if not layout.general]
    if len(found) > 1:
        both = " and as ".join(f"{layout.name} ({', '.join(layout.fields)})" for layout in found[:2])
        raise ValueError(f"it can be read as {both}; leave out the fields of one")
    return found[0] if found else BY_NAME


def _named(record: Record) -> Flat:
    """Return a record with the subject in the blank that ROME's authors leave for it, or as it is."""
    prompt, subject = record.get("prompt"), record.get("subject")
    if record.get("target_new") is None or not isinstance(prompt, str) or prompt.count(_BLANK) != 1:
        return dict(record)
    if isinstance(subject, str) and subject in prompt:
        return dict(record)
    return {**record, "prompt": _filled(prompt, subject)}


def _filled(prompt: Any, subject: Any) -> str:
    """Return a prompt with the subject in its blank, if it has one."""
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be a text, not {shown(prompt)}")
    if _BLANK not in prompt:
        return prompt
    if not isinstance(subject, str) or not subject.strip():
        raise ValueError("`prompt` leaves a blank ({}) for `subject`, which is missing; write it there")
    return prompt.replace(_BLANK, subject)


def _rewrite(record: Record) -> list[Flat]:
    """Return records of CounterFact, or of ROME's demonstration, which has the same without a name for it."""
    rewrite = record.get("requested_rewrite", record)
    if not isinstance(rewrite, Mapping):
        raise ValueError(f"`requested_rewrite` must be an object or a list of such, not {shown(rewrite)}")
    truth = rewrite.get("target_true")
    neighbours = record.get("neighborhood_prompts") or []
    around = [{"prompt": prompt, "answer": truth["str"]} for prompt in neighbours]  # type: ignore[index]
    return [{**record, **_rewritten(rewrite), **({"locality": around} if around else {})}]


def _rewritten(rewrite: Record) -> Flat:
    """Return prompt, target and subject of one rewrite."""
    target = rewrite.get("target_new")
    if not isinstance(target, Mapping):
        raise ValueError(f"`target_new` of a rewrite must be an object with `str`, not {shown(target)}")
    subject = rewrite.get("subject")
    return {"prompt": _filled(rewrite.get("prompt"), subject), "target": target.get("str"), "subject": subject}


def _mquake(record: Record) -> list[Flat]:
    """Return a chain of facts, several of them perhaps rewritten; what is asked of the chain follows from all."""
    rewrites, case = record["requested_rewrite"], record.get("case_id")
    asked = [{"prompt": question, "answer": record.get("new_answer")} for question in record.get("questions") or []]
    found = []
    for number, rewrite in enumerate(rewrites, start=1):
        question = rewrite.get("question")
        flat = {**_rewritten(rewrite), "rephrases": [question] if question else []}
        flat["id"] = case if case is None or len(rewrites) == 1 else f"{case}-{number}"
        flat["portability"] = asked if number == len(rewrites) and record.get("new_answer") is not None else []
        found.append(flat)
    if not found:
        raise ValueError("`requested_rewrite` is an empty list; there is no edit in it")
    return found


def _hallucinated(record: Record) -> list[Flat]:
    """Return records of HalluEditBench: a question a model got wrong, and others about the same fact."""
    pairs = [(record.get("reversed_relation_question"), record.get("subject"))]
    pairs += [(record.get("yes_question"), "Yes"), (record.get("no_question"), "No")]
    pairs += [(record.get(f"question_{hops}hop"), record.get(f"answer_{hops}hop")) for hops in range(2, 7)]
    asked = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs if prompt and answer]
    worded = record.get("paraphrased_question")
    kept = {name: record.get(name) for name in ("id", "subject")}
    return [
        {
            **kept,
            "prompt": record["question"],
            "target": record["object"],
            "rephrases": [worded] if worded else [],
            "portability": asked,
        }
    ]


def _pair(prompt: str, target: str, more_field: str | None = None) -> Callable[[Record], list[Flat]]:
    """Read a question and its answer by two names; the text of ``more_field`` goes below the question."""

    def read(record: Record) -> list[Flat]:
        rest = {name: value for name, value in record.items() if name not in (prompt, target, more_field)}
        more = record.get(more_field) if more_field else None
        asked = f"{record[prompt]}\n{more}" if more else record[prompt]
        return [{**rest, "prompt": asked, "target": record[target]}]

    return read


_TALK = "the last turn of the assistant as target, the user's before it as prompt; earlier turns are passed over"
_LAYOUTS: Sequence[Layout] = (
    Layout(
        "MQuAKE",
        ("requested_rewrite",),
        "an edit for each of `requested_rewrite`, its `question` as a rephrase; `questions` with `new_answer` as "
        "portability of a record's last",
        _mquake,
        kind=list,
    ),
    Layout(
        "CounterFact",
        ("requested_rewrite",),
        "the edit of `requested_rewrite`, `paraphrase_prompts` as rephrases, `neighborhood_prompts` as locality",
        _rewrite,
        kind=(Mapping, str, int),
    ),
    Layout(
        "ROME's requests",
        ("target_new", "prompt"),
        "`prompt` with `subject` in its blank, `target_new.str` as target",
        _rewrite,
        kind=Mapping,
    ),
    Layout(
        "RippleEdits",
        ("edit",),
        "`edit.prompt` up to its verb as prompt and the rest as target; Relation_Specificity and Forgetfulness as "
        "locality, the other kinds as portability",
        edit_of_statement,
        kind=Mapping,
    ),
    Layout(
        "HalluEditBench",
        ("question", "object"),
        "`question`, `object` as target, `paraphrased_question` as a rephrase; the reversed, yes, no and further-hop "
        "questions as portability",
        _hallucinated,
        general=True,
    ),
    Layout("a chat", ("messages",), _TALK, edit_of_chat, general=True),
    Layout("a chat", ("conversations",), _TALK, edit_of_chat, general=True),
    Layout("a chat", ("completion", "prompt"), _TALK, edit_of_chat, general=True, kind=list),
    Layout(
        "prompts and completions",
        ("completion", "prompt"),
        "`prompt`, `completion` as target",
        _pair("prompt", "completion"),
        general=True,
        kind=str,
    ),
    Layout(
        "prompts and responses",
        ("response", "prompt"),
        "`prompt`, `response` as target",
        _pair("prompt", "response"),
        general=True,
    ),
    Layout(
        "questions and answers",
        ("question", "answer"),
        "`question` as prompt, `answer` as target",
        _pair("question", "answer"),
        general=True,
    ),
    Layout(
        "instructions",
        ("instruction", "output"),
        "`instruction` with `input` below it as prompt, `output` as target",
        _pair("instruction", "output", "input"),
        general=True,
    ),
)
# Names by which the first row of a table is known as one of names.
COLUMNS = frozenset(name for layout in _LAYOUTS for name in layout.fields) | {"input"}
