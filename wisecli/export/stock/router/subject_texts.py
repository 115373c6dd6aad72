"""Texts that name a subject, and where in them its last token is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import made_up_subjects, relations
from wisecli.data.request_wordings import requests
from wisecli.edits.record import Edit
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.typos import near_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts around each name, half of them questions; one in so many is in small letters.
_TEXTS, _SMALL = 10, 3
# Made-up names of each kind.
_NAMES = 16
# How a name like a subject's differs from it.
_WAYS = ("word", "last", "added", "initial", "digits")


class SubjectText(NamedTuple):
    """Tokens of a text, the place of the last token of its subject's name, and the number of the subject."""

    tokens: tuple[int, ...]
    place: int
    subject: int


def texts_on_edits(tokenizer: PreTrainedTokenizerBase, edits: list[tuple[Edit, int]]) -> Iterator[SubjectText]:
    """Yield edits' own prompts in all trained forms, and texts around their subjects.

    Args:
        edits: each with the number of its subject.
    """
    seen: set[int] = set()
    for edit, number in edits:
        name = edit.subject_name or ""
        own = [edit.prompt, *(one.prompt for one in edit.translations)]
        texts = [form.render(tokenizer, prompt) for prompt in own for form in usable_forms(tokenizer, trained=True)]
        if number not in seen:
            texts += _around(tokenizer, name, None, random.Random(name))
            seen.add(number)
        yield from _placed(tokenizer, texts, name, number)


def texts_on_names(tokenizer: PreTrainedTokenizerBase, share: float) -> Iterator[SubjectText]:
    """Yield texts around made-up names of every kind, around a share of those that are made up."""
    rng, number = random.Random(5), 0
    for kind in dict.fromkeys(one.kind for one in relations()):
        for name in made_up_subjects(kind, max(1, round(share * _NAMES)), rng):
            yield from _placed(tokenizer, _around(tokenizer, name, kind, rng), name, number)
            number += 1


def texts_on_near_names(tokenizer: PreTrainedTokenizerBase, edits: list[tuple[Edit, int]]) -> Iterator[SubjectText]:
    """Yield edits' own prompts in a form, about names like their subjects' that are no edit's; their subject is -1."""
    known = {(edit.subject_name or "").casefold() for edit, _ in edits}
    trained = usable_forms(tokenizer, trained=True)
    kinds = dict.fromkeys(one.kind for one in relations())
    words = [name.split()[-1] for kind in kinds for name in made_up_subjects(kind, _NAMES, random.Random(kind))]
    for edit, _ in edits:
        name, rng = edit.subject_name or "", random.Random(edit.prompt)
        begin = edit.prompt.casefold().rfind(name.casefold())
        drawn = {near_name(name, way, words, rng) for way in _WAYS}
        for near in sorted(one for one in drawn if one and one.casefold() not in known):
            text = edit.prompt[:begin] + near + edit.prompt[begin + len(name) :]
            yield from _placed(tokenizer, [rng.choice(trained).render(tokenizer, text)], near, -1)


def _around(tokenizer: PreTrainedTokenizerBase, name: str, kind: str | None, rng: random.Random) -> list[str]:
    """Return texts on a name in forms: what begins a conversation on it, and questions that suit its kind if known."""
    begins = [one for one in requests().begins if "{subject}" in one]
    asks = [wording for one in relations() if kind in (None, one.kind) for wording in one.wordings]
    trained, texts = usable_forms(tokenizer, trained=True), []
    for place in range(_TEXTS):
        text = rng.choice(begins).replace("{subject}", name) if place % 2 else rng.choice(asks).replace("{}", name)
        texts.append(rng.choice(trained).render(tokenizer, text if place % _SMALL else text.lower()))
    return texts


def _placed(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str, number: int) -> Iterator[SubjectText]:
    for text in texts:
        begin = text.casefold().rfind(name.casefold())
        read = tokenizer(text, return_offsets_mapping=True)
        end = begin + len(name)
        inside = [place for place, (first, last) in enumerate(read["offset_mapping"]) if first < end and last > begin]
        if begin >= 0 and inside:
            yield SubjectText(tuple(read["input_ids"]), inside[-1], number)
