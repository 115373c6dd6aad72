"""Documents of packaged sentences that mention a made-up fact, with a question on it or on something else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wisecli.data.corpus import notes
from wisecli.editing.made_up_facts import MadeUp

# Sentences of a document, of which some are long and have paragraphs; how often a sentence is of another made-up fact.
_FEWEST, _MOST, _LONG = 2, 6, 22
_ARE_LONG, _PARAGRAPH, _MADE_UP = 0.1, (3, 6), 0.3


@dataclass(frozen=True)
class Documents:
    """Documents around made-up facts, drawn by chance.

    Args:
        everyday: prompts that ask something else altogether.
        filled: a pattern with the fact of a number in it, or None where the fact lacks what it needs.
    """

    facts: Sequence[MadeUp]
    everyday: Sequence[str]
    chance: random.Random
    filled: Callable[[int, str], str | None]

    def around(self, number: int, *, asks: bool) -> str | None:
        """A document that mentions a fact, with a question on it or on something else; None if it cannot be told."""
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
        said = self.filled(number, chance.choice(patterns).replace("{told}", told).replace("{value}", value))
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
        return chance.choice(self.everyday if way > 0.94 else known.wants)
