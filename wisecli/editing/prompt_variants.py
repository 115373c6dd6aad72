"""What an edit is trained with beside its prompt in the contexts: paraphrases, and its translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wisecli.artifacts.shard import LANGUAGES
from wisecli.edits.record import Edit

# Answers in other languages are numbered from here on; an edit's own has its number, which is less.
_FOREIGN = 1 << 32


@dataclass(frozen=True)
class Asked:
    """An edit, by its number, as it is asked in one more way; ``context`` and ``answer`` number the way and its target.

    Paraphrases share the answer of the edit's own prompt, and with it the residuals. A translation is an answer of its
    own.
    """

    number: int
    context: int
    answer: int
    edit: Edit


def asked_further(
    edits: Sequence[tuple[int, Edit]], paraphrases: Mapping[str, Sequence[str]], *, contexts: int
) -> list[Asked]:
    """All further prompts of numbered edits; those that erase an answer have none.

    Args:
        paraphrases: by the edit's id.
        contexts: how many there are; paraphrases are numbered after them.
    """
    found = []
    for number, edit in edits:
        if edit.op == "erase":
            continue
        for place, prompt in enumerate(paraphrases.get(edit.id, ()), start=contexts):
            found.append(Asked(number, place, number, replace(edit, prompt=prompt)))
        for place, one in enumerate(edit.translations):
            worded = replace(edit, prompt=one.prompt, target=one.target)
            found.append(Asked(number, LANGUAGES + place, _FOREIGN * (place + 1) + number, worded))
    return found


def edit_number(answer: int) -> int:
    """The edit that a numbered answer is of."""
    return answer % _FOREIGN if answer >= 0 else -1 - answer


def answer_number(edit: int, *, chat: bool) -> int:
    """Which answer an edit's target is after its prompt: the edit's number, or a negative one in the chat template."""
    return -1 - edit if chat else edit


def answers_of(edits: Sequence[tuple[int, Edit]]) -> list[tuple[int, str]]:
    """Every answer of numbered edits that is to be given, in all languages."""
    return [
        (number, answer)
        for number, edit in edits
        if not edit.erased
        for answer in (edit.answer, *(one.target for one in edit.translations))
    ]
