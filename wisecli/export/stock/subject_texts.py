"""Texts that name a subject, where in them its last token is, and at which tokens no name ends."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import everyday_prompts, made_up_subjects, notes, reference_pages, relations
from wisecli.data.request_wordings import requests
from wisecli.edits.checks.unnamed_subjects import names_its_subject
from wisecli.edits.record import Edit
from wisecli.edits.text import words
from wisecli.export.stock.backgrounds import backgrounds
from wisecli.models.prompts.prompt_forms import Form, usable_forms
from wisecli.models.prompts.typos import near_name
from wisecli.models.synthetic.request_examples import Examples
from wisecli.models.synthetic.synthetic_facts import synthetic_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts around each name, half of them questions; one in so many is in small letters.
_TEXTS, _SMALL = 10, 3
# Made-up names of each kind; made-up facts, and how many texts on other things and reference pages are drawn for each.
_NAMES, _FACTS, _OF_FACT, _PAGES = 16, 50, 10, 16
# Backgrounds, the seed that they are drawn by, and how many each edit's prompt is read after.
_BACKGROUNDS, _SEED, _BEHIND = 12, 9, 2
# How a name like a subject's differs from it; texts in which its last word stands alone.
_WAYS, _ALONE = ("word", "last", "added", "initial", "digits"), 4


class SubjectText(NamedTuple):
    """Tokens of a text, the place of the last token of its subject's name, and the number of the subject.

    ``within`` and ``around`` are the places of other tokens of the name and of the text around it, but for those at
    which the name of an edit's subject ends.
    """

    tokens: tuple[int, ...]
    place: int
    subject: int
    within: tuple[int, ...]
    around: tuple[int, ...]


class _KnownNames:
    """Names of edits' subjects, found by their first words."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_word = defaultdict[str, list[str]](list)
        for name in dict.fromkeys(name.casefold() for name in names if name):
            self._by_word[next(iter(words(name)), "")].append(name)

    def ends(self, text: str) -> set[int]:
        """Return where names end in a text."""
        names = [name for word in {"", *words(text)} for name in self._by_word.get(word, ())]
        return {found.end() for name in names for found in re.finditer(re.escape(name), text.casefold())}


def texts_on_edits(tokenizer: PreTrainedTokenizerBase, edits: list[tuple[Edit, int]]) -> Iterator[SubjectText]:
    """Yield edits' own prompts in all trained forms, and texts around their subjects.

    Args:
        edits: each with the number of its subject.
    """
    seen: set[int] = set()
    known = _KnownNames(edit.subject_name or "" for edit, _ in edits)
    for edit, number in edits:
        name, texts = edit.subject_name or "", [text for _, text, _ in own_texts(tokenizer, edit)]
        if number not in seen:
            texts += texts_on_subject(tokenizer, name)
            seen.add(number)
        yield from _placed(tokenizer, texts, name, number, known)


def own_texts(tokenizer: PreTrainedTokenizerBase, edit: Edit) -> Iterator[tuple[Form, str, str]]:
    """Yield an edit's prompts in every trained form: the form, the text and its answer."""
    own = [(edit.prompt, edit.answer), *((translation.prompt, translation.target) for translation in edit.translations)]
    trained = usable_forms(tokenizer, trained=True)
    return ((form, form.render(tokenizer, prompt), answer) for prompt, answer in own for form in trained)


def texts_on_subject(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Return texts in forms on the subject of an edit, the same whenever it is asked."""
    return _around(tokenizer, name, None, random.Random(name))


def texts_on_names(tokenizer: PreTrainedTokenizerBase, share: float) -> Iterator[SubjectText]:
    """Yield texts around made-up names of every kind, around a share of those that are made up."""
    rng, number = random.Random(5), 0
    for kind in dict.fromkeys(relation.kind for relation in relations()):
        for name in made_up_subjects(kind, max(1, round(share * _NAMES)), rng):
            yield from _placed(tokenizer, _around(tokenizer, name, kind, rng), name, number, _KnownNames([]))
            number += 1


def texts_on_other_things(tokenizer: PreTrainedTokenizerBase, share: float) -> list[tuple[int, ...]]:
    """Return the tokens of texts that name no subject of an edit: everyday prompts in forms with replies, and what asks
    and mentions made-up facts, in documents and conversations too, and pages full of names, dates and numbers.

    Args:
        share: how much of them is wanted.
    """
    rng, trained = random.Random(6), usable_forms(tokenizer, trained=True)
    facts = list(synthetic_facts(max(2, round(share * _FACTS)), rng))
    examples, before = Examples(tokenizer, facts, rng), backgrounds(tokenizer, _BACKGROUNDS, seed=_SEED)
    drawn = [text for number in range(len(facts)) for text in (*examples.of(number), *examples.conversations(number))]
    mentioned = rng.sample(drawn, min(len(drawn), _OF_FACT * len(facts)))
    everyday = [rng.choice(trained).render(tokenizer, text) for text in everyday_prompts(_OF_FACT * len(facts), seed=7)]
    behind = [background.before(tokenizer, text) for background, text in zip(before, everyday, strict=False)]
    answered = [f"{text}{'' if text[-1:].isspace() else ' '}{requests().reply(rng)}" for text in everyday]
    pages = reference_pages(_PAGES * len(facts), seed=8)
    texts = [*answered, *behind, *(example.text for example in mentioned), *pages]
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def texts_behind_others(tokenizer: PreTrainedTokenizerBase, edits: list[tuple[Edit, int]]) -> Iterator[SubjectText]:
    """Yield edits' own prompts after pages and conversations on everyday matters, up to the names of their
    subjects.
    """
    before = backgrounds(tokenizer, _BACKGROUNDS, seed=_SEED)
    for edit, number in edits:
        chosen = random.Random(edit.prompt).sample(before, _BEHIND)
        texts = [background.before(tokenizer, edit.prompt) for background in chosen]
        for placed in _placed(tokenizer, texts, edit.subject_name or "", number, _KnownNames([])):
            yield placed._replace(tokens=placed.tokens[: placed.place + 1], around=())


def texts_on_near_names(tokenizer: PreTrainedTokenizerBase, edits: list[tuple[Edit, int]]) -> Iterator[SubjectText]:
    """Yield edits' prompts about similar names that are no edit's, and texts on these names' last words; subject -1."""
    known = {(edit.subject_name or "").casefold() for edit, _ in edits}
    found, trained = _KnownNames(known), usable_forms(tokenizer, trained=True)
    kinds = dict.fromkeys(relation.kind for relation in relations())
    others = [name.split()[-1] for kind in kinds for name in made_up_subjects(kind, _NAMES, random.Random(kind))]
    for edit, _ in edits:
        name, rng = edit.subject_name or "", random.Random(edit.prompt)
        begin = edit.prompt.casefold().rfind(name.casefold())
        drawn = {near_name(name, way, others, rng) for way in _WAYS}
        for near in sorted(drawn_name for drawn_name in drawn if drawn_name and drawn_name.casefold() not in known):
            text = edit.prompt[:begin] + near + edit.prompt[begin + len(name) :]
            yield from _placed(tokenizer, [rng.choice(trained).render(tokenizer, text)], near, -1, found)
        last = name.split()[-1]
        for told, _ in rng.sample(notes().about, _ALONE) if last != name and last.casefold() not in known else ():
            alone = rng.choice((last, f"the {last.lower()}"))
            text = rng.choice(trained).render(tokenizer, told.replace("{subject}", alone))
            yield from _placed(tokenizer, [text], alone, -1, found)


def name_of(edit: Edit) -> str:
    """Return the name of an edit's subject, as its prompt names it; "" where that does not."""
    return edit.subject_name or "" if names_its_subject(edit) else ""


def _around(tokenizer: PreTrainedTokenizerBase, name: str, kind: str | None, rng: random.Random) -> list[str]:
    """Return texts on a name in forms: what begins a conversation on it, and questions that suit its kind if known."""
    begins = [begin for begin in requests().begins if "{subject}" in begin]
    asks = [wording for relation in relations() if kind in (None, relation.kind) for wording in relation.wordings]
    trained, texts = usable_forms(tokenizer, trained=True), []
    for place in range(_TEXTS):
        text = rng.choice(begins).replace("{subject}", name) if place % 2 else rng.choice(asks).replace("{}", name)
        texts.append(rng.choice(trained).render(tokenizer, text if place % _SMALL else text.lower()))
    return texts


def _placed(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str, number: int, known: _KnownNames
) -> Iterator[SubjectText]:
    """Yield the texts that contain a name, with the tokens of the name's end, inside it and around it."""
    for text in texts:
        begin = text.casefold().rfind(name.casefold())
        read = tokenizer(text, return_offsets_mapping=True)
        end, ends = begin + len(name), known.ends(text)
        offsets = list(enumerate(read["offset_mapping"]))
        inside = [place for place, (first, last) in offsets if first < end and last > begin]
        if begin >= 0 and inside:
            free = [place for place, (first, last) in offsets if not any(first < other <= last for other in ends)]
            within = tuple(place for place in free if inside[0] <= place < inside[-1])
            around = tuple(place for place in free if not inside[0] <= place <= inside[-1])
            yield SubjectText(tuple(read["input_ids"]), inside[-1], number, within, around)
