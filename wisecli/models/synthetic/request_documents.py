"""Documents of packaged sentences that mention a made-up fact, with a question on it or on something else."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wisecli.data.corpus import notes
from wisecli.models.synthetic.synthetic_facts import SyntheticFact

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

    facts: Sequence[SyntheticFact]
    everyday: Sequence[str]
    rng: random.Random
    filled: Callable[[int, str], str | None]

    def around(self, number: int, *, asks: bool) -> str | None:
        """Return a document that mentions a fact, with a question on it or on something else; None if it cannot be
        told.
        """
        known, rng, fact = notes(), self.rng, self.facts[number]
        most = _LONG if rng.random() < _ARE_LONG else _MOST
        some = rng.sample(known.notes, rng.randint(_FEWEST, most))
        sentences, wanted = [text for text, _ in some], [ask for _, ask in some]
        sentences = [self._statement(text) for text in sentences]
        said, about = self._said(number, asks=asks)
        if said is not None:
            sentences.insert(rng.randint(0, len(sentences)), said)
        elif not asks:
            return None
        chosen = rng.choice(fact.questions) if asks else self._other_ask(number, wanted, about)
        opening = rng.choice(known.openings)
        text = opening + (rng.choice("\n ") if opening else "") + self._paragraphs(sentences)
        if asks and rng.random() < 0.2:
            half = len(sentences) // 2
            return self._paragraphs(sentences[:half]) + f"\n\n{chosen}\n\n" + self._paragraphs(sentences[half:])
        return rng.choice(known.layouts).replace("{text}", text).replace("{ask}", chosen)

    def _statement(self, sentence: str) -> str:
        """Return a sentence as it is, or instead of it what an edit of another made-up fact would say."""
        rng = self.rng
        other = rng.choice(self.facts)
        if not other.statements or rng.random() > _MADE_UP:
            return sentence
        return f"{rng.choice(other.statements)} {other.answer}."

    def _paragraphs(self, sentences: Sequence[str]) -> str:
        """Sentences as one text, in paragraphs if there are many."""
        if len(sentences) <= _MOST + 1:
            return " ".join(sentences)
        return self.rng.choice(("\n\n", "\n\n", "\n", " ")).join(in_paragraphs(sentences, self.rng))

    def _said(self, number: int, *, asks: bool) -> tuple[str | None, str | None]:
        """Return what a document says of a fact's subject, and a question on that, if there is one."""
        known, rng, fact = notes(), self.rng, self.facts[number]
        way = rng.random()
        if asks and way < 0.55:
            return None, None
        if way < 0.7:
            text, ask = rng.choice(known.about)
            return text.replace("{subject}", fact.subject), ask.replace("{subject}", fact.subject)
        if asks and way < 0.75:
            return rng.choice(fact.beside or (None,)), None
        patterns = known.statements if asks or rng.random() < 0.5 else known.quotes
        value = fact.answer if asks or rng.random() < 0.5 else fact.value
        told = f"{rng.choice(fact.statements)} {value}." if fact.statements else f"{fact.subject}: {value}."
        said = self.filled(number, rng.choice(patterns).replace("{told}", told).replace("{value}", value))
        return (said or told), None

    def _other_ask(self, number: int, wanted: Sequence[str], about: str | None) -> str:
        """Return what is wanted of a document that mentions a fact."""
        known, rng, fact = notes(), self.rng, self.facts[number]
        way = rng.random()
        if about is not None and way < 0.5:
            return about
        if way < 0.65:
            return rng.choice(wanted)
        if way < 0.75:
            return rng.choice(known.about)[1].replace("{subject}", fact.subject)
        if way < 0.82 and fact.beside:
            return rng.choice(fact.beside)
        if way < 0.88:
            return rng.choice(fact.questions).replace(fact.subject, fact.other)
        return rng.choice(self.everyday if way > 0.94 else known.wants)


def in_paragraphs(sentences: Sequence[str], rng: random.Random) -> list[str]:
    """Return sentences in paragraphs, each of a few by chance."""
    parts, first = list[str](), 0
    while first < len(sentences):
        size = rng.randint(*_PARAGRAPH)
        parts.append(" ".join(sentences[first : first + size]))
        first += size
    return parts
