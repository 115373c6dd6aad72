"""RippleEdits: statements of facts, whose answers stand at their ends → edits."""

from collections.abc import Iterator, Mapping
from typing import Any

from wisecli.io.json_schema import shown

Record = Mapping[str, Any]
Flat = dict[str, Any]

# What stands between what a statement asks and its answer, and kinds of questions that must not change.
_VERBS = (" is followed by ", " follows ", " still alive? ", " is ", " are ")
_UNCHANGED = ("Relation_Specificity", "Forgetfulness")
_FOLLOWING = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
# Phrases with two verbs, of which the second is meant: "the continent which Leeds is part of is".
_DOUBLED = (" with is ", " of is ", " in is ", " has is ", " won is ")


def edit_of_statement(record: Record) -> list[Flat]:
    """Return the edit of a record: a statement of the new fact with its answer at the end, and questions by kind.

    Raises:
        ValueError: it cannot be told where the answer begins.
    """
    edit = record["edit"]
    prompt, target = _parted(record)
    flat = {"prompt": prompt, "target": target, "id": record.get("id", edit.get("id"))}
    for name, kinds in (("locality", _UNCHANGED), ("portability", _FOLLOWING)):
        flat[name] = [query for kind in kinds for query in _queries(record.get(kind) or [])]
    return [flat]


def _queries(tests: Any) -> Iterator[Flat]:
    """Yield the questions of one kind that have an answer, each with its first."""
    for test in tests:
        for query in test["test_queries"]:
            answers = [answer["value"] for answer in query.get("answers") or [] if answer.get("value")]
            if answers and query.get("prompt"):
                yield {"prompt": query["prompt"], "answer": answers[0]}


def _parted(record: Record) -> tuple[str, str]:
    """Part a statement into what it asks and its answer.

    Raises:
        ValueError: it cannot be told where the answer begins.
    """
    edit = record["edit"]
    whole = edit.get("prompt")
    if not isinstance(whole, str):
        raise ValueError(f"`edit.prompt` must be a text, not {shown(whole)}")
    statement = whole.strip().removesuffix(".")
    ends = {at + len(verb) for verb in _VERBS for at in range(len(statement)) if statement.startswith(verb, at)}
    former = edit.get("original_fact") or edit.get("previous_fact")
    if isinstance(former, Mapping) and isinstance(former.get("prompt"), str):
        same = [end for end in ends if former["prompt"].startswith(statement[:end])]
        ends = {max(same)} if same else set()
    answers = {query["answer"] for kind in _FOLLOWING for query in _queries(record.get(kind) or [])}
    ends = {end for end in ends if statement[end:] in answers} or ends
    if len(ends) > 1:
        ends = {end for end in ends if statement[:end].endswith(_DOUBLED)}
    if len(ends) != 1:
        raise ValueError(
            f"it cannot be told where the answer begins in {shown(whole)}; write it as `prompt` and `target`, or give "
            "the former fact as `original_fact`"
        )
    (end,) = ends
    return statement[:end].strip(), statement[end:].strip()
