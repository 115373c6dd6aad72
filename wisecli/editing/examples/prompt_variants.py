"""Further prompts that an edit is trained with: paraphrases and translations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from wisecli.artifacts.shard import FIRST_LANGUAGE
from wisecli.edits.record import Edit


class AnswerKey(NamedTuple):
    """Which answer is trained: an edit's number, its language (0 its own, from 1 on its translations), and whether it
    is the answer in the chat template, where a target may be other tokens.
    """

    edit: int
    language: int = 0
    chat: bool = False


@dataclass(frozen=True)
class PromptVariant:
    """An edit, by its number, as it is asked in one more way, with the number of that way and the answer to it.

    Paraphrases share the answer of the edit's own prompt, and so its residuals. A translation is an answer of its own.
    """

    number: int
    context: int
    answer: AnswerKey
    edit: Edit


def prompt_variants(
    edits: Sequence[tuple[int, Edit]], paraphrases: Mapping[str, Sequence[str]], *, contexts: int
) -> list[PromptVariant]:
    """Return the paraphrases and translations of numbered edits; edits that erase an answer have none.

    Args:
        paraphrases: by the edit's id.
        contexts: how many there are; paraphrases are numbered after them.
    """
    found = []
    for number, edit in edits:
        if edit.op == "erase":
            continue
        for place, prompt in enumerate(paraphrases.get(edit.id, ()), start=contexts):
            found.append(PromptVariant(number, place, AnswerKey(number), replace(edit, prompt=prompt)))
        for place, translation in enumerate(edit.translations):
            worded = replace(edit, prompt=translation.prompt, target=translation.target)
            found.append(PromptVariant(number, FIRST_LANGUAGE + place, AnswerKey(number, place + 1), worded))
    return found
