"""Made-up facts in prompts that ask them and in prompts that mention them, of which a request gate is learned.

They come from the kinds of prompts that may be learned from (``data/kinds.toml``), from the forms that edits are
trained in, from tasks, times and conversations (``data/requests.toml``), and from documents (``data/notes.toml``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import everyday_prompts, notes, requests
from wisecli.editing.further_questions import two_hops, yes_or_no
from wisecli.editing.made_up_facts import MadeUp
from wisecli.editing.request_documents import Documents
from wisecli.models.chat import chat_turns
from wisecli.models.forms import forms, usable_forms
from wisecli.models.kind_slots import Fact, filled
from wisecli.models.kinds import Kind, kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How often a prompt is a chat, and how often a chat has something before the question.
_CHATS, _LATER = 0.5, 0.5
# How often an earlier turn is about another made-up fact, and how often whitespace stands behind a text.
_ON_FACTS, _SPACED = 0.35, 0.1
# Kinds that conversations or documents of notes stand for, and those whose question is not in what is asked.
_ELSEWHERE = ("follow-up", "moved on", "question first", "question in the middle")
_EVERYDAY = 400
_CONVERSATIONS = 4
# How many questions of each sort on a fact's answer are made of its own.
_MADE = 3
# Other questions than a fact's, as slots.
_OTHERWISE = ("{negated}", "{negated}", "{negated}", "{near:word}", "{near:added}")
_NAMED = re.compile(r"\{(?:subject|namesake)\}")
# How often something else is asked about a fact's subject: few such prompts come to the gate.
_BESIDE = 0.4
# What is asked behind other texts, in front of them and between them.
_AROUND = Kind(
    "around texts",
    True,
    (
        ("{paragraph}\n\n{question}",),
        ("{paragraph} {question}",),
        ("{paragraph}\n{question}",),
        ("{paragraph}\n\n{paragraph}\n\n{question}",),
        ("{paragraph}\n\n{full}\n\n{paragraph}",),
        ("{paragraph} {full} {paragraph}",),
        ("{full}\n\n{paragraph}",),
        ("{full} {paragraph}",),
        ("{page}\n\n{question}",),
        ("{full}\n\n{page}",),
    ),
    (),
)


# Whether a prompt asks, of which sort it is, and its text if it can be written.
_Drawn = tuple[bool, str, str | None]


class Example(NamedTuple):
    """A prompt around the made-up fact of a number, and whether it asks it."""

    fact: int
    text: str
    asks: bool
    sort: str = ""


@dataclass
class Examples:
    """Prompts around made-up facts, drawn by chance, as a tokenizer writes them."""

    tokenizer: PreTrainedTokenizerBase
    facts: Sequence[MadeUp]
    chance: random.Random

    def __post_init__(self) -> None:
        self._everyday = everyday_prompts(_EVERYDAY, seed=3)
        self._documents = Documents(self.facts, self._everyday, self.chance, self._filled)

    def of(self, number: int) -> Iterator[Example]:
        """Prompts that ask a fact, and prompts that mention it."""
        for asks, sort, text in self._of(number):
            if text is not None:
                behind = self.chance.choice((" ", "\n", "  ", "\n\n")) if self.chance.random() < _SPACED else ""
                yield Example(number, text + behind, asks, sort)

    def _of(self, number: int) -> Iterator[_Drawn]:
        yield from self._asking(number)
        yield from self._corrected(number)
        for _ in range(2):
            yield True, "document", self._put(self._documents.around(number, asks=True))
        yield from self._mentioning(number)
        yield from self._on_its_answer(number)
        for _ in range(3):
            yield False, "document", self._put(self._documents.around(number, asks=False))
        beside = self.facts[number].beside
        if beside and self.chance.random() < _BESIDE:
            yield False, "beside", self._put(self.chance.choice(beside))
        yield from self._of_kinds(number)

    def _asking(self, number: int) -> Iterator[_Drawn]:
        """The questions as they are, in forms and patterns, of the present, and with the answer begun."""
        known, chance, fact = requests(), self.chance, self.facts[number]
        for question in fact.questions:
            yield True, "plain", self._put(question)
        for form in chance.sample(usable_forms(self.tokenizer, trained=True), 3):
            yield True, "form", form.asked(self.tokenizer, chance.choice(fact.questions))
        for pattern in chance.sample(known.asked, 4):
            yield True, "asked", self._put(self._filled(number, pattern))
        yield True, "time", self._put(known.now(chance.choice(fact.questions), chance))
        yield True, "begun", self._begun(number)

    def _corrected(self, number: int) -> Iterator[_Drawn]:
        """A question on another name that is corrected to the fact's, and the other way round."""
        known, chance = requests(), self.chance
        correct = "{elsewhere} " + chance.choice(known.corrects)
        yield True, "correction", self._put(self._filled(number, correct))
        swapped = {"{subject}": "{namesake}", "{namesake}": "{subject}"}
        away = "{full} " + _NAMED.sub(lambda name: swapped[name[0]], chance.choice(known.corrects))
        yield False, "correction", self._put(self._filled(number, away))

    def _mentioning(self, number: int) -> Iterator[_Drawn]:
        """The questions with something else wanted of them, or of another time."""
        known, chance, fact = requests(), self.chance, self.facts[number]
        yield False, "other question", self._put(self._filled(number, self._carried(chance.choice(_OTHERWISE))))
        for _ in range(2):
            yield False, "task", self._put(known.task(chance.choice(fact.questions), chance))
        yield False, "time", self._put(self._carried(known.timed(chance.choice(fact.questions), chance)))
        later = f"{{the:{chance.choice(known.adjectives)}}}" if chance.random() < 0.4 else None
        timed = known.timed(chance.choice(fact.questions), chance)
        yield False, "time", self._put((later and self._filled(number, later)) or timed)
        for pattern in chance.sample(known.mentioned, 4):
            yield False, "mentioned", self._put(self._filled(number, pattern))

    def _on_its_answer(self, number: int) -> Iterator[_Drawn]:
        """Whether something is the answer, and what is asked of it."""
        known, chance, fact = requests(), self.chance, self.facts[number]
        yield False, "hops", self._put(self._first(number, known.hops))
        yield False, "checks", self._put(self._first(number, known.checks))
        for _ in range(_MADE):
            yield False, "hops", self._put(two_hops((*fact.questions, *fact.told), fact.subject, chance))
            value = chance.choice((fact.answer, fact.value))
            yield False, "checks", self._put(yes_or_no(chance.choice(fact.questions), fact.told, value, chance))

    def _of_kinds(self, number: int) -> Iterator[_Drawn]:
        """Prompts of some kinds, in those of their patterns that may be learned from."""
        chance = self.chance
        usable = [kind for kind in kinds().values() if kind.name not in _ELSEWHERE]
        for kind in (_AROUND, _AROUND, *chance.sample(usable, 3)):
            chat = bool(self.tokenizer.chat_template) and not kind.begun and chance.random() < _CHATS
            turns = kind.drawn(self._fact(number), trained=True, chance=chance, chat=False)
            yield kind.asked, kind.name, None if turns is None else kind.told(self.tokenizer, turns, chat=chat)

    def held_back(self, number: int) -> Iterator[Example]:
        """Prompts of every kind that mention a fact and don't ask it, in wordings for evaluation alone."""
        for place, kind in enumerate(one for one in kinds().values() if not one.asked):
            chat = place % 2 == number % 2
            fact = self._fact(number)
            text = kind.written(self.tokenizer, fact, trained=False, chance=self.chance, chat=chat)
            if text is not None:
                yield Example(number, text, False, kind.name)

    def conversations(self, number: int) -> Iterator[Example]:
        """Chats whose last turn asks a fact that the turns before it name in part, and others that do not."""
        if not self.tokenizer.chat_template:
            return
        drawn = list(self._conversations(number))
        for asks, turns in self.chance.sample(drawn, min(_CONVERSATIONS, len(drawn))):
            told = self._turns(number, turns)
            if told is not None:
                yield Example(number, told, asks, "conversation")

    def _conversations(self, number: int) -> Iterator[tuple[bool, list[str]]]:
        known, chance, fact = requests(), self.chance, self.facts[number]
        begin, refer, correct, leave = map(chance.choice, (known.begins, known.refers, known.corrects, known.leaves))
        on_other = chance.choice(known.begins).replace("{subject}", "{namesake}")
        beside = chance.choice(fact.beside or (begin,))
        yield True, [chance.choice((begin, begin, beside)), refer]
        yield True, [*chance.choice(([], [], [on_other])), begin, chance.choice(known.refers)]
        yield True, ["{elsewhere}", correct]
        yield False, [chance.choice((begin, "{full}", "{full}")), leave]
        yield False, ["{full}", chance.choice((chance.choice(self._everyday), chance.choice(known.turns)))]
        yield False, [begin, chance.choice(("And what about {namesake}?", on_other)), refer]
        away = chance.choice(fact.beside or ("Why?",)).replace(fact.subject, chance.choice(("it", "he", "she", "this")))
        yield False, [chance.choice((begin, "{full}")), away]

    def _carried(self, question: str) -> str:
        """Another question in the place of a fact's, in a pattern that asks it."""
        alone = [one for one in requests().asked if one.count("{") == 1 and "{question}" in one]
        return self.chance.choice(alone).replace("{question}", question)

    def _begun(self, number: int) -> str | None:
        """A question and the beginning of its answer, which in a chat is the assistant's."""
        known, chance = requests(), self.chance
        said, chat = chance.choice(known.begun), bool(self.tokenizer.chat_template) and chance.random() < _CHATS
        pattern = ("{full}", said) if chat else (chance.choice(known.begun_around).replace("{said}", said),)
        kind = Kind("begun", True, (pattern,), (), begun=True)
        turns = kind.drawn(self._fact(number), trained=True, chance=chance, chat=chat)
        return None if turns is None else kind.told(self.tokenizer, turns, chat=chat)

    def _turns(self, number: int, turns: Sequence[str]) -> str | None:
        """Patterns of a user's turns as one chat, with a reply to each but the last."""
        known, chance = requests(), self.chance
        for _ in range(3):
            found = filled(self._fact(number), turns, chance)
            if found is None:
                continue
            told = [("system", chance.choice(known.systems))] if chance.random() < 0.2 else []
            for turn in found[:-1]:
                told += [("user", turn), ("assistant", chance.choice(known.replies))]
            return chat_turns(self.tokenizer, [*told, ("user", found[-1])])
        return None

    def _fact(self, number: int) -> Fact:
        fact, chance = self.facts[number], self.chance
        second = self.facts[number - 1]
        also = Fact(next((text for text in second.questions if text.endswith("?")), second.questions[0]))
        question = chance.choice(fact.questions)
        return Fact(question, fact.subject, fact.answer, fact.value, fact.kind, fact.other, also)

    def _filled(self, number: int, pattern: str) -> str | None:
        """A pattern with the fact in it, in the first wording that has what it needs."""
        for _ in range(3):
            turns = filled(self._fact(number), (pattern,), self.chance)
            if turns is not None:
                return turns[0]
        return None

    def _first(self, number: int, patterns: Sequence[str]) -> str | None:
        """The first of some patterns, in an order by chance, that the fact can be put into."""
        drawn = (self._filled(number, pattern) for pattern in self.chance.sample(patterns, min(12, len(patterns))))
        return next((text for text in drawn if text is not None), None)

    def _put(self, text: str | None) -> str | None:
        """A text as it is, or as a user's turn, be it a later one."""
        chance, known = self.chance, requests()
        if text is None or not self.tokenizer.chat_template or chance.random() > _CHATS:
            return text
        if chance.random() > _LATER:
            return forms()["chat"].asked(self.tokenizer, text)
        told = [("system", chance.choice(known.systems))] if chance.random() < 0.4 else []
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            told += zip(("user", "assistant"), self._earlier(), strict=True)
        return chat_turns(self.tokenizer, [*told, ("user", text)])

    def _earlier(self) -> tuple[str, str]:
        """A user's turn on something else, and what was replied."""
        known, chance = requests(), self.chance
        way = chance.random()
        if way < _ON_FACTS:
            fact = chance.choice(self.facts)
            said = f"{chance.choice(fact.told)} {fact.answer}." if fact.told and chance.random() < 0.5 else fact.answer
            return chance.choice(fact.questions), said
        asked = chance.choice(known.turns if way < 2 * _ON_FACTS else self._everyday)
        return asked, chance.choice((chance.choice(known.replies), chance.choice(notes().notes)[0]))
