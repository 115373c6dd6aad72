"""What stands in the slots of the patterns of ``data/kinds.toml``: a fact's own words, and what is made of them.

=================  ==================================================================================================
``question``       the edit's prompt; ``full`` the same if it is a question, ``second`` a question of another fact
``subject`` …      ``answer``, ``other`` (another value); ``begun`` is the first word of an answer that has several
``inner``          the prompt from a small letter on, without its mark, which is ``mark``; ``capitals``
``stem``           a question without its mark; ``asking`` from a small letter on, ``lower`` all in small letters
``noun``           the question as a noun phrase (``Noun`` from a capital on); ``person``, ``place``, ``thing`` and
                   ``time`` the same where it names one
``the:first``      the question with an adjective after its first ``the``; ``negated`` is with ``not``
``keywords:last``  its words without small ones, with the subject ``first``, ``last`` or where it is ``asked``
``near:word``      the question on a name with another ``word``, ``last`` or ``added`` word, ``initial`` or ``digits``
``dressed:bold``   the question with the subject's name in ``bold``, between ``quotes``, ``curly`` or ``single`` ones
                   or ``dashes``, or with an ``aside`` after it
``slips:swap``     the question with two slips: ``swap``, ``drop``, ``double`` or ``near`` (the key beside)
``pronoun``        the question with a pronoun for its subject; ``pronoun_inner`` from a small letter on, unmarked
``namesake``       another name; ``elsewhere`` is the question on it, ``elsewhere_pronoun`` that with a pronoun
``document``       a text that mentions the subject, and ``beside`` a question on something else in it
``paragraph``      such a text on another name; ``page`` is several of them, of 100 to 600 words
=================  ==================================================================================================
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from wisecli.data.corpus import PEOPLE, capital, made_up_subjects
from wisecli.models.prompts.question_rewriting import (
    keywords,
    lowered,
    negated,
    noun_phrase,
    with_adjective,
    with_pronoun,
    without_mark,
)
from wisecli.models.prompts.typos import near_name, with_typos

_SLOT = re.compile(r"\{(\w+)(?::([\w -]+))?\}")
# How many texts a page has: each has some 75 words.
_FEWEST, _MOST = 2, 7
# How often a name is drawn that may turn out not to fit.
_TRIES = 8


@dataclass(frozen=True)
class Fact:
    """A fact that is asked or mentioned: its question, or the beginning of a statement that its answer completes.

    Args:
        other: another value that the same question could have.
        kind: what the subject is, as in ``data/subjects.toml``; other names are of that kind.
        namesake: another name, of which the same could be asked; a made-up one if None.
        second: a fact that is asked in the same prompt.
        name_words: words by which the subject becomes another name; those of the half that is drawn from, if none.
    """

    question: str
    subject: str | None = None
    answer: str | None = None
    other: str | None = None
    kind: str | None = None
    namesake: str | None = None
    second: Fact | None = None
    name_words: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether it is asked by a question, and not by the beginning of a statement."""
        return self.question.rstrip().endswith("?")

    @property
    def named(self) -> str | None:
        """The subject, if the question names it."""
        return self.subject if self.subject and self.subject in self.question else None


@dataclass(frozen=True)
class Text:
    """A text with a subject in its slot, a place for a sentence on it, and questions on what else it says."""

    text: str
    asks: tuple[str, ...]


@dataclass(frozen=True)
class PatternHalf:
    """What one half of the data has around patterns: texts, what they say of an edit, and words for other names."""

    texts: tuple[Text, ...]
    sentences: tuple[str, ...]
    mentions: tuple[str, ...]
    names: tuple[str, ...]


# Words by which one name becomes another, where no half of the data says which.
_NO_TEXTS = PatternHalf(
    (), (), (), ("Lesser", "Southern", "Golden", "Ashby", "Elder", "Bridge", "Grey", "Fourth", "Old", "Royal")
)


def slots_in(pattern: str) -> list[tuple[str, str]]:
    """Return the slots of a pattern, each with its way, which is empty for most."""
    return [(name, way or "") for name, way in _SLOT.findall(pattern)]


def filled(fact: Fact, turns: Sequence[str], rng: random.Random) -> list[str] | None:
    """Return texts with a fact in their slots, none of them a document; None where it lacks what a slot needs."""
    return Filling(fact, _NO_TEXTS, rng).filled(turns)


@dataclass
class Filling:
    """What one fact puts into the slots of one prompt, drawn by chance; what is drawn for a slot stays.

    Args:
        value: what a document says of the fact: its ``answer``, an ``other`` value or ``none``.
    """

    fact: Fact
    half: PatternHalf
    rng: random.Random
    value: str = "none"
    _paragraphs: int = field(default=0, init=False)

    def filled(self, turns: Sequence[str]) -> list[str] | None:
        """Return texts with their slots filled; None where the fact lacks what one of them needs."""
        known: dict[tuple[str, str], str] = {}
        for slot in [slot for turn in turns for slot in slots_in(turn) if slot[0] != "paragraph"]:
            if slot not in known:
                text = self._one(*slot)
                if text is None:
                    return None
                known[slot] = text

        def put(found: re.Match[str]) -> str:
            return self._paragraph() if found[1] == "paragraph" else known[found[1], found[2] or ""]

        return [_SLOT.sub(put, turn) for turn in turns]

    def _one(self, name: str, way: str) -> str | None:
        """Return what stands in one slot, or None."""
        if name in _OF_FACTS:
            return _OF_FACTS[name](self.fact)
        if name in _OF_QUESTIONS:
            return _OF_QUESTIONS[name](self.fact) if self.fact.asks else None
        if name in _MADE:
            return _MADE[name](self, way)
        return _OF_SUBJECTS[name](self, way, self.fact.named) if self.fact.named else None

    def _near(self, way: str, subject: str) -> str | None:
        words = self.fact.name_words or self.half.names
        drawn = (near_name(subject, way, words, self.rng) for _ in range(_TRIES))
        found = next((name for name in drawn if name), None)
        return self.fact.question.replace(subject, found) if found else None

    def _pronoun(self, subject: str) -> str | None:
        return with_pronoun(self.fact.question, subject, self.rng, person=self._person)

    def _pronoun_inner(self, subject: str) -> str | None:
        text = self._pronoun(subject)
        return lowered(without_mark(text), None) if text else None

    def _noun(self, subject: str, *sorts: str) -> str | None:
        """Return the question as a noun phrase, if it names one of these sorts."""
        found = noun_phrase(self.fact.question, subject)
        return found[0] if found and (not sorts or found[1] in sorts) else None

    def _elsewhere(self, subject: str) -> str | None:
        return self.fact.question.replace(subject, self._namesake) if self.fact.asks else None

    def _elsewhere_pronoun(self, subject: str) -> str | None:
        question = self._elsewhere(subject)
        return with_pronoun(question, self._namesake, self.rng, person=self._person) if question else None

    @property
    def _person(self) -> bool | None:
        return None if self.fact.kind is None else self.fact.kind in PEOPLE

    @cached_property
    def _namesake(self) -> str:
        """Another name: the fact's, or a made-up one of the same kind or of a person."""
        if self.fact.namesake:
            return self.fact.namesake
        kind = self.fact.kind or "person"
        names = made_up_subjects(kind, _TRIES, self.rng)
        return next((name for name in names if name != self.fact.subject), names[0])

    @cached_property
    def _text(self) -> tuple[str, str] | None:
        """A text that mentions the subject and what is asked about it, and a question on something else in it."""
        subject, question = self.fact.named, self.fact.question
        value = {"answer": self.fact.answer, "other": self.fact.other}.get(self.value)
        if not subject or (value is None and self.value != "none"):
            return None
        phrase = self._noun(subject)
        sentences = self.half.mentions if self.value == "none" else self.half.sentences
        usable = [text for text in sentences if phrase or "oun}" not in text]
        words = {"noun": phrase or "", "Noun": _capital(phrase) or "", "question": question, "value": value or ""}
        sentence = _put(self.rng.choice(usable), words)
        text = self.rng.choice(self.half.texts)
        about = {"subject": subject, "sentence": sentence}
        return _put(text.text, about), _put(self.rng.choice(text.asks), about)

    @cached_property
    def _others(self) -> list[str]:
        """All texts of this half on other names, in random order."""
        names = iter(made_up_subjects(self.fact.kind or "person", len(self.half.texts), self.rng))
        drawn = self.rng.sample(self.half.texts, len(self.half.texts))
        return [re.sub(" +", " ", _put(text.text, {"subject": next(names), "sentence": ""})) for text in drawn]

    def _paragraph(self) -> str:
        self._paragraphs += 1
        return self._others[-self._paragraphs]

    def _page(self) -> str:
        return "\n\n".join(self._others[: self.rng.randint(_FEWEST, _MOST)])


def _begun(answer: str | None) -> str | None:
    words = (answer or "").split()
    return words[0] if len(words) > 1 else None


def _put(text: str, words: dict[str, str]) -> str:
    return _SLOT.sub(lambda found: words[found[1]], text)


def _capital(text: str | None) -> str | None:
    return capital(text) if text else None


def _second(fact: Fact) -> str | None:
    return fact.second.question if fact.second and fact.second.asks else None


_OF_FACTS: dict[str, Callable[[Fact], str | None]] = {
    "question": lambda fact: fact.question,
    "subject": lambda fact: fact.subject,
    "answer": lambda fact: fact.answer,
    "other": lambda fact: fact.other,
    "second": _second,
    "begun": lambda fact: _begun(fact.answer),
    "mark": lambda fact: "?" if fact.asks else "",
    "inner": lambda fact: lowered(without_mark(fact.question), fact.subject),
    "capitals": lambda fact: fact.question.upper(),
}
_OF_QUESTIONS: dict[str, Callable[[Fact], str]] = {
    "full": lambda fact: fact.question,
    "stem": lambda fact: without_mark(fact.question),
    "asking": lambda fact: lowered(without_mark(fact.question), fact.subject),
    "lower": lambda fact: without_mark(fact.question).lower(),
}
_MADE: dict[str, Callable[[Filling, str], str | None]] = {
    "the": lambda filling, way: with_adjective(filling.fact.question, way, filling.fact.named),
    "slips": lambda filling, way: with_typos(filling.fact.question, way, filling.rng),
    "page": lambda filling, _: filling._page(),
}
_DRESSES = {
    "bold": "**{}**",
    "quotes": '"{}"',
    "curly": "“{}”",
    "single": "'{}'",
    "dashes": "– {} –",
    "aside": "{}, if that is how it is spelt,",
}
_OF_SUBJECTS: dict[str, Callable[[Filling, str, str], str | None]] = {
    "negated": lambda filling, _, subject: negated(filling.fact.question, subject),
    "keywords": lambda filling, way, subject: keywords(filling.fact.question, subject, way),
    "near": lambda filling, way, subject: filling._near(way, subject),
    "dressed": lambda filling, way, subject: filling.fact.question.replace(subject, _DRESSES[way].format(subject)),
    "pronoun": lambda filling, _, subject: filling._pronoun(subject),
    "pronoun_inner": lambda filling, _, subject: filling._pronoun_inner(subject),
    "noun": lambda filling, _, subject: filling._noun(subject),
    "Noun": lambda filling, _, subject: _capital(filling._noun(subject)),
    "person": lambda filling, _, subject: filling._noun(subject, "person"),
    "place": lambda filling, _, subject: filling._noun(subject, "place"),
    "thing": lambda filling, _, subject: filling._noun(subject, "thing"),
    "time": lambda filling, _, subject: filling._noun(subject, "time"),
    "namesake": lambda filling, _, __: filling._namesake,
    "elsewhere": lambda filling, _, subject: filling._elsewhere(subject),
    "elsewhere_pronoun": lambda filling, _, subject: filling._elsewhere_pronoun(subject),
    "document": lambda filling, _, __: filling._text[0] if filling._text else None,
    "beside": lambda filling, _, __: filling._text[1] if filling._text else None,
}
SLOTS_WITH_A_WAY = frozenset({"the", "keywords", "near", "dressed", "slips"})
SLOTS = frozenset({*_OF_FACTS, *_OF_QUESTIONS, *_MADE, *_OF_SUBJECTS, "paragraph"}) - SLOTS_WITH_A_WAY
