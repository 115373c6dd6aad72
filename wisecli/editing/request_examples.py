"""Made-up facts in prompts that ask them and in prompts that mention them, of which a request gate is learned.

They come from the kinds of prompts that may be learned from (``data/kinds.toml``), from the forms that edits are
trained in, from tasks, times and conversations (``data/requests.toml``), and from documents (``data/notes.toml``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import everyday_prompts, made_up_subjects, notes, relations, requests
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
# Sentences of a document, of which some are long and have paragraphs; how often a sentence is of another made-up fact.
_FEWEST, _MOST, _LONG = 2, 6, 22
_ARE_LONG, _PARAGRAPH, _MADE_UP = 0.1, (3, 6), 0.3
# Names of each kind that the facts are about.
_NAMES = 40
_EVERYDAY = 400
_CONVERSATIONS = 4
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


class Example(NamedTuple):
    """A prompt around the made-up fact of a number, and whether it asks it."""

    fact: int
    text: str
    asks: bool
    sort: str = ""


@dataclass(frozen=True)
class MadeUp:
    """A made-up fact: ``questions`` in several wordings, the first of which an edit would have, and as statements.

    ``beside`` are questions of something else about the same subject.
    """

    subject: str
    kind: str
    questions: tuple[str, ...]
    told: tuple[str, ...]
    beside: tuple[str, ...]
    other: str
    answer: str
    value: str


def made_up_facts(count: int, chance: random.Random) -> Iterator[MadeUp]:
    """So many facts of all relations."""
    known = relations()
    names = {kind: made_up_subjects(kind, _NAMES, chance) for kind in dict.fromkeys(one.kind for one in known)}
    for _ in range(count):
        relation = chance.choice(known)
        subject, other = chance.sample(names[relation.kind], 2)
        asks = [text.replace("{}", subject) for text in relation.asks]
        tells = [text.replace("{}", subject) for text in relation.tells]
        wordings = chance.sample([*asks, *tells], min(3, len(asks) + len(tells)))
        if not any(text in asks for text in wordings):
            wordings[-1] = chance.choice(asks)
        like = [one for one in known if one.kind == relation.kind and one is not relation]
        beside = tuple(chance.choice(one.asks).replace("{}", subject) for one in chance.sample(like, min(3, len(like))))
        answer, value = (chance.choice(names[chance.choice(list(names))]) for _ in range(2))
        yield MadeUp(subject, relation.kind, tuple(wordings), tuple(tells), beside, other, answer, value)


@dataclass
class Examples:
    """Prompts around made-up facts, drawn by chance, as a tokenizer writes them."""

    tokenizer: PreTrainedTokenizerBase
    facts: Sequence[MadeUp]
    chance: random.Random

    def __post_init__(self) -> None:
        self._everyday = everyday_prompts(_EVERYDAY, seed=3)

    def of(self, number: int) -> Iterator[Example]:
        """Prompts that ask a fact, and prompts that mention it."""
        for asks, sort, text in self._of(number):
            if text is not None:
                behind = self.chance.choice((" ", "\n", "  ", "\n\n")) if self.chance.random() < _SPACED else ""
                yield Example(number, text + behind, asks, sort)

    def _of(self, number: int) -> Iterator[tuple[bool, str, str | None]]:
        known, chance, fact = requests(), self.chance, self.facts[number]
        for form in chance.sample(usable_forms(self.tokenizer, trained=True), 3):
            yield True, "form", form.asked(self.tokenizer, chance.choice(fact.questions))
        for pattern in chance.sample(known.asked, 4):
            yield True, "asked", self._put(self._filled(number, pattern))
        for _ in range(2):
            yield True, "document", self._put(self._document(number, asks=True))
        for _ in range(2):
            yield False, "task", self._put(known.task(chance.choice(fact.questions), chance))
        yield False, "time", self._put(known.timed(chance.choice(fact.questions), chance))
        later = f"{{the:{chance.choice(known.adjectives)}}}" if chance.random() < 0.4 else None
        timed = known.timed(chance.choice(fact.questions), chance)
        yield False, "time", self._put((later and self._filled(number, later)) or timed)
        for pattern in chance.sample(known.mentioned, 4):
            yield False, "mentioned", self._put(self._filled(number, pattern))
        yield False, "hops", self._put(self._first(number, known.hops))
        yield False, "checks", self._put(self._first(number, known.checks))
        for _ in range(3):
            yield False, "document", self._put(self._document(number, asks=False))
        if fact.beside and chance.random() < _BESIDE:
            yield False, "beside", self._put(chance.choice(fact.beside))
        usable = [kind for kind in kinds().values() if kind.name not in _ELSEWHERE]
        for kind in (_AROUND, _AROUND, *chance.sample(usable, 3)):
            chat = bool(self.tokenizer.chat_template) and not kind.begun and chance.random() < _CHATS
            turns = kind.drawn(self._fact(number), trained=True, chance=chance, chat=False)
            yield kind.asked, kind.name, None if turns is None else kind.told(self.tokenizer, turns, chat=chat)

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

    def _document(self, number: int, *, asks: bool) -> str | None:
        """A document and a question, which is the fact's or another."""
        known, chance, fact = notes(), self.chance, self.facts[number]
        most = _LONG if chance.random() < _ARE_LONG else _MOST
        some = chance.sample(known.notes, chance.randint(_FEWEST, most))
        sentences, wanted = [text for text, _ in some], [ask for _, ask in some]
        sentences = [self._statement(text) for text in sentences]
        said, about = self._said(number, asks=asks)
        if said is not None:
            sentences.insert(chance.randint(0, len(sentences)), said)
        elif not asks:
            return None
        chosen = chance.choice(fact.questions) if asks else self._other_ask(number, wanted, about)
        opening = chance.choice(known.openings)
        text = opening + (chance.choice("\n ") if opening else "") + self._paragraphs(sentences)
        if asks and chance.random() < 0.2:
            half = len(sentences) // 2
            return self._paragraphs(sentences[:half]) + f"\n\n{chosen}\n\n" + self._paragraphs(sentences[half:])
        return chance.choice(known.layouts).replace("{text}", text).replace("{ask}", chosen)

    def _statement(self, sentence: str) -> str:
        """A sentence as it is, or instead of it what an edit of another made-up fact would say."""
        chance = self.chance
        other = chance.choice(self.facts)
        if not other.told or chance.random() > _MADE_UP:
            return sentence
        return f"{chance.choice(other.told)} {other.answer}."

    def _paragraphs(self, sentences: Sequence[str]) -> str:
        """Sentences as one text, in paragraphs if there are many."""
        if len(sentences) <= _MOST + 1:
            return " ".join(sentences)
        mark, parts, first = self.chance.choice(("\n\n", "\n\n", "\n", " ")), [], 0
        while first < len(sentences):
            size = self.chance.randint(*_PARAGRAPH)
            parts.append(" ".join(sentences[first : first + size]))
            first += size
        return mark.join(parts)

    def _said(self, number: int, *, asks: bool) -> tuple[str | None, str | None]:
        """What a document says of a fact's subject, and a question on that, if there is one."""
        known, chance, fact = notes(), self.chance, self.facts[number]
        way = chance.random()
        if asks and way < 0.55:
            return None, None
        if way < 0.7:
            text, ask = chance.choice(known.about)
            return text.replace("{subject}", fact.subject), ask.replace("{subject}", fact.subject)
        if asks and way < 0.75:
            return chance.choice(fact.beside or (None,)), None
        patterns = known.statements if asks or chance.random() < 0.5 else known.quotes
        value = fact.answer if asks or chance.random() < 0.5 else fact.value
        told = f"{chance.choice(fact.told)} {value}." if fact.told else f"{fact.subject}: {value}."
        said = self._filled(number, chance.choice(patterns).replace("{told}", told).replace("{value}", value))
        return (said or told), None

    def _other_ask(self, number: int, wanted: Sequence[str], about: str | None) -> str:
        """What is wanted of a document that mentions a fact."""
        known, chance, fact = notes(), self.chance, self.facts[number]
        way = chance.random()
        if about is not None and way < 0.5:
            return about
        if way < 0.65:
            return chance.choice(wanted)
        if way < 0.75:
            return chance.choice(known.about)[1].replace("{subject}", fact.subject)
        if way < 0.82 and fact.beside:
            return chance.choice(fact.beside)
        if way < 0.88:
            return chance.choice(fact.questions).replace(fact.subject, fact.other)
        return chance.choice(self._everyday if way > 0.94 else known.wants)
