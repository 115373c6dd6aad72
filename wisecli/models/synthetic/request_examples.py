"""Made-up facts in prompts that ask them and in prompts that mention them, of which a request gate is learned.

They come from the kinds of prompts that may be learned from (``data/kinds.toml``), from the forms that edits are
trained in, from tasks, times and conversations (``data/requests.toml``, with words of ``data/phrases.toml``), and from
documents (``data/notes.toml``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import everyday_prompts
from wisecli.data.request_wordings import requests
from wisecli.models.prompts.chat_template import chat_turns
from wisecli.models.prompts.pattern_slots import Fact, filled
from wisecli.models.prompts.prompt_forms import forms, usable_forms
from wisecli.models.prompts.prompt_kinds import Kind, kinds
from wisecli.models.prompts.typos import LEARNED_TYPOS
from wisecli.models.synthetic.chat_histories import chat_history
from wisecli.models.synthetic.further_questions import two_hops, yes_or_no
from wisecli.models.synthetic.request_documents import Documents
from wisecli.models.synthetic.synthetic_facts import SyntheticFact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How often a prompt is a chat, and how often a chat has something before the question.
_CHATS, _LATER = 0.5, 0.5
# How often whitespace stands behind a text.
_SPACED = 0.1
# Kinds that conversations, documents of notes or examples of their own stand for.
_ELSEWHERE = ("follow-up", "moved on", "question first", "question in the middle", "dressed name")
_EVERYDAY = 400
# So many chat histories are drawn. Each stands before many prompts, so that a model reads it once for all of them.
_HISTORIES = 48
_CONVERSATIONS = 4
# How many questions of each sort on a fact's answer are made of its own.
_MADE = 3
# Slots: questions with slips; questions on longer names; and other questions than a fact's.
_TYPOS = tuple(f"{{slips:{kind}}}" for kind in LEARNED_TYPOS)
# How often a question is asked in capitals, and how; a task is written in capitals half as often.
_LOUD = 0.6
_CAPITALS = ("{capitals}", "{capitals}", "HELLO, {capitals}", "{capitals} THANKS", "QUESTION: {capitals}")
_NEAR_NAMES = ("{near:word}", "{near:added}")
_OTHERWISE = ("{negated}", "{negated}", "{negated}", *_NEAR_NAMES)
_NAMED = re.compile(r"\{(?:subject|namesake)\}")
# How often something else is asked about a fact's subject: few such prompts come to the gate.
_BESIDE = 0.4
# Of which sort a prompt is, and its text if it can be written.
_Sorted = tuple[str, str | None]
# Whether a prompt asks, of which sort it is, and its text if it can be written.
_Drawn = tuple[bool, str, str | None]


class Example(NamedTuple):
    """A prompt around the made-up fact of a number, and whether it asks it.

    Of a prompt with a ``second`` fact in it only the part that may ask the first is learned from. ``turns`` says
    whether a user's turns before the last one are looked at, too.
    """

    fact: int
    text: str
    asks: bool
    sort: str = ""
    second: int | None = None
    turns: bool = False


@dataclass
class Examples:
    """Prompts around made-up facts, drawn by chance, as a tokenizer writes them."""

    tokenizer: PreTrainedTokenizerBase
    facts: Sequence[SyntheticFact]
    rng: random.Random

    def __post_init__(self) -> None:
        self._everyday = everyday_prompts(_EVERYDAY, seed=3)
        self._histories = [chat_history(self.facts, self._everyday, self.rng) for _ in range(_HISTORIES)]
        self._documents = Documents(self.facts, self._everyday, self.rng, self._filled)

    def of(self, number: int) -> Iterator[Example]:
        """Prompts that ask a fact, and prompts that mention it."""
        for asks, sort, text in self._of(number):
            if text is not None:
                behind = self.rng.choice((" ", "\n", "  ", "\n\n")) if self.rng.random() < _SPACED else ""
                yield Example(number, text + behind, asks, sort)

    def _of(self, number: int) -> Iterator[_Drawn]:
        yield from self._asking(number)
        yield from self._corrected(number)
        for _ in range(2):
            yield True, "document", self._put(self._documents.around(number, asks=True))
        for sort, text in self._mentioned(number):
            yield False, sort, self._put(text)
        for _ in range(3):
            yield False, "document", self._put(self._documents.around(number, asks=False))
        beside = self.facts[number].beside
        if beside and self.rng.random() < _BESIDE:
            yield False, "beside", self._put(self.rng.choice(beside))
        yield from self._of_kinds(number)

    def _asking(self, number: int) -> Iterator[_Drawn]:
        """Yield the questions as they are, in forms and patterns, misspelt, of the present, with the answer begun."""
        known, rng, fact = requests(), self.rng, self.facts[number]
        for question in fact.questions:
            yield True, "plain", self._put(question)
        for form in rng.sample(usable_forms(self.tokenizer, trained=True), 3):
            yield True, "form", form.render(self.tokenizer, rng.choice(fact.questions))
        for pattern in rng.sample(known.asked, 3):
            yield True, "asked", self._put(self._filled(number, pattern))
        for _ in range(2):
            yield True, "instructed", self._put(known.instructed(rng.choice(fact.questions), rng))
        if rng.random() < _LOUD:
            yield True, "capitals", self._put(self._filled(number, rng.choice(_CAPITALS)))
        yield True, "one of several", self._put(known.one_of_several(rng.choice(fact.questions), rng))
        for _ in range(2):
            yield True, "time", self._put(known.now(rng.choice(fact.questions), rng))
        yield True, "typos", self._put(self._filled(number, rng.choice(_TYPOS)))
        yield True, "begun", self._begun(number)

    def _corrected(self, number: int) -> Iterator[_Drawn]:
        """Yield a question on another name that is corrected to the fact's, and the other way round."""
        known, rng = requests(), self.rng
        correct = "{elsewhere} " + rng.choice(known.corrects)
        yield True, "correction", self._put(self._filled(number, correct))
        swapped = {"{subject}": "{namesake}", "{namesake}": "{subject}"}
        away = "{full} " + _NAMED.sub(lambda name: swapped[name[0]], rng.choice(known.corrects))
        yield False, "correction", self._put(self._filled(number, away))

    def _mentioned(self, number: int) -> Iterator[_Sorted]:
        """Yield texts that mention a fact, as they are, before any stands in a chat."""
        yield from self._mentioning(number)
        yield from self._on_its_answer(number)

    def _mentioning(self, number: int) -> Iterator[_Sorted]:
        """Yield the questions with something else wanted of them, or of another time."""
        known, rng, fact = requests(), self.rng, self.facts[number]
        yield "other question", self._filled(number, self._carried(rng.choice(_OTHERWISE)))
        for near in _NEAR_NAMES:
            yield "near name", self._filled(number, rng.choice((near, self._carried(near))))
        for around in (False, True):
            task = known.task(rng.choice(fact.questions), rng)
            yield "task", known.with_words_around(task, rng) if around else task
            framed = known.framed_task(rng.choice(fact.questions), rng)
            yield "task", framed.upper() if rng.random() < _LOUD / 2 else framed
        yield "time", self._carried(known.timed(rng.choice(fact.questions), rng))
        yield "time", known.timed(rng.choice(fact.questions), rng)
        later = f"{{the:{rng.choice(known.adjectives)}}}" if rng.random() < 0.4 else None
        timed = known.timed(rng.choice(fact.questions), rng)
        yield "time", (later and self._filled(number, later)) or timed
        for pattern in rng.sample(known.mentioned, 4):
            yield "mentioned", self._filled(number, pattern)

    def _on_its_answer(self, number: int) -> Iterator[_Sorted]:
        """Yield whether something is the answer, and what is asked of it."""
        known, rng, fact = requests(), self.rng, self.facts[number]
        yield "hops", self._first(number, known.hops)
        yield "checks", self._first(number, known.checks)
        for _ in range(_MADE):
            yield "hops", two_hops((*fact.questions, *fact.statements), fact.subject, rng)
            value = rng.choice((fact.answer, fact.value))
            yield "checks", yes_or_no(rng.choice(fact.questions), fact.statements, value, rng)

    def _of_kinds(self, number: int) -> Iterator[_Drawn]:
        """Prompts of some kinds, in those of their patterns that may be learned from."""
        rng = self.rng
        usable = [kind for kind in kinds().values() if kind.name not in _ELSEWHERE]
        around = Kind("around texts", True, tuple((one,) for one in requests().around), ())
        for kind in (around, around, *rng.sample(usable, 3)):
            chat = bool(self.tokenizer.chat_template) and not kind.begun and rng.random() < _CHATS
            turns = kind.sample_turns(self._fact(number), trained=True, rng=rng, chat=False)
            yield kind.asked, kind.name, None if turns is None else kind.render_turns(self.tokenizer, turns, chat=chat)

    def conversations(self, number: int, count: int = _CONVERSATIONS) -> Iterator[Example]:
        """So many chats: of some the last turn asks a fact that the turns before it name in part, of others not."""
        if not self.tokenizer.chat_template:
            return
        drawn = list(self._conversations(number))
        for asks, turns in self.rng.sample(drawn, min(count, len(drawn))):
            told = self._turns(number, turns)
            if told is not None:
                yield Example(number, told, asks, "conversation", turns=True)

    def _conversations(self, number: int) -> Iterator[tuple[bool, list[str]]]:
        known, rng, fact = requests(), self.rng, self.facts[number]
        begin, refer, correct, leave = map(rng.choice, (known.begins, known.refers, known.corrects, known.leaves))
        on_other = rng.choice(known.begins).replace("{subject}", "{namesake}")
        beside = rng.choice(fact.beside or (begin,))
        yield True, [rng.choice((begin, begin, beside)), refer]
        yield True, [*rng.choice(([], [], [on_other])), begin, rng.choice(known.refers)]
        yield True, ["{elsewhere}", correct]
        yield False, [rng.choice((begin, "{full}", "{full}")), leave]
        yield False, ["{full}", rng.choice((rng.choice(self._everyday), rng.choice(known.turns)))]
        yield False, [begin, rng.choice(("And what about {namesake}?", on_other)), refer]
        away = rng.choice(fact.beside or ("Why?",)).replace(fact.subject, rng.choice(("it", "he", "she", "this")))
        yield False, [rng.choice((begin, "{full}")), away]

    def _carried(self, question: str) -> str:
        """Another question in the place of a fact's, in a pattern that asks it."""
        alone = [one for one in requests().asked if one.count("{") == 1 and "{question}" in one]
        return self.rng.choice(alone).replace("{question}", question)

    def _begun(self, number: int) -> str | None:
        """Return a question and the beginning of its answer, which in a chat is the assistant's."""
        known, rng = requests(), self.rng
        said, chat = rng.choice(known.begun), bool(self.tokenizer.chat_template) and rng.random() < _CHATS
        pattern = ("{full}", said) if chat else (rng.choice(known.begun_around).replace("{said}", said),)
        kind = Kind("begun", True, (pattern,), (), begun=True)
        turns = kind.sample_turns(self._fact(number), trained=True, rng=rng, chat=chat)
        return None if turns is None else kind.render_turns(self.tokenizer, turns, chat=chat)

    def _turns(self, number: int, turns: Sequence[str]) -> str | None:
        """Patterns of a user's turns as one chat, with a reply to each but the last."""
        known, rng = requests(), self.rng
        for _ in range(3):
            found = filled(self._fact(number), turns, rng)
            if found is None:
                continue
            told = [("system", rng.choice(known.systems))] if rng.random() < 0.2 else []
            for turn in found[:-1]:
                told += [("user", turn), ("assistant", rng.choice(known.replies))]
            return chat_turns(self.tokenizer, [*told, ("user", found[-1])])
        return None

    def _fact(self, number: int) -> Fact:
        fact, rng = self.facts[number], self.rng
        second = self.facts[number - 1]
        also = Fact(next((text for text in second.questions if text.endswith("?")), second.questions[0]))
        question = rng.choice(fact.questions)
        return Fact(question, fact.subject, fact.answer, fact.value, fact.kind, fact.other, also)

    def _filled(self, number: int, pattern: str) -> str | None:
        """Return a pattern with the fact in it, in the first wording that has what it needs."""
        for _ in range(3):
            turns = filled(self._fact(number), (requests().spelled_out(pattern, self.rng),), self.rng)
            if turns is not None:
                return turns[0]
        return None

    def _first(self, number: int, patterns: Sequence[str]) -> str | None:
        """Return the first of some patterns, in an order by chance, that the fact can be put into."""
        drawn = (self._filled(number, pattern) for pattern in self.rng.sample(patterns, min(12, len(patterns))))
        return next((text for text in drawn if text is not None), None)

    def _put(self, text: str | None) -> str | None:
        """Return a text as it is, or as a user's turn, be it a later one."""
        if text is None or not self.tokenizer.chat_template or self.rng.random() > _CHATS:
            return text
        if self.rng.random() > _LATER:
            return forms()["chat"].render(self.tokenizer, text)
        return chat_turns(self.tokenizer, [*self.rng.choice(self._histories), ("user", text)])
