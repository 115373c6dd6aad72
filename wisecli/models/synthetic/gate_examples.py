"""Made-up facts in prompts that the request gate alone is learned from, and in those that it is checked with.

Beside the prompts of :mod:`.request_examples` these stand in forms and behind texts, ask two facts at once, ask
something of the answer, or are chats of every sort; and those that nothing is learned from, by which is measured what
the gate lets through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice

from wisecli.data.request_wordings import requests, whole_prompts
from wisecli.models.prompts.pattern_slots import Fact, filled
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.prompt_kinds import Kind, kinds
from wisecli.models.synthetic.further_questions import two_hops
from wisecli.models.synthetic.request_examples import Example, Examples

# Texts on other names, the first of which stand in front of a prompt; how many are a long text; what is between.
_TEXTS, _LONG, _BETWEEN = Kind("texts", True, (("{paragraph}",) * 4,), ()), (2, 4), ("\n\n", " ", "\n")
# Kinds that name the subject and nothing else of a fact.
_NAMING = ("story", "comparison", "other question")
# How often something that names a subject alone stands behind a long text, as a question always does: were it as often,
# the gate would take long texts for a sign that nothing is asked. And how often that is another question of its kind.
_NAMED, _BESIDE = 1 / 3, 0.5
# How often a question with words around stands behind a text, and how often what wants no answer has such words.
_BEHIND, _AROUND = 1 / 3, 0.5
# How often a question with answers to choose from is a text with which something is to be done.
_CHOICE_TASKS = 0.4
# So many questions on attributes are tried until one fits the answer.
_ATTRIBUTES = 16
# Conversations on each fact: all that are drawn.
_CONVERSATIONS = 7
# The sort of examples that are written whole, as others put together from phrases are not.
WHOLE_PROMPTS = "whole prompts"
# Whole prompts on each fact, that ask it and that mention it.
_WHOLE_ASKED, _WHOLE_MENTIONED = 12, 18
# How often one that asks, and one that mentions, stands behind a text: of the latter many hold one themselves.
_WHOLE_BEHIND = {True: 1 / 4, False: 1 / 12}
# All are added anew where so few are left to choose from.
_SHORT_DECK = 100
# Wordings of a fact that are tried for one.
_WORDINGS_TRIED = 3


class GateExamples(Examples):
    """Prompts around made-up facts for a request gate, drawn by chance, as a tokenizer writes them."""

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples of all facts, one sort after the other."""
        for draw in (
            self.of,
            self.standing_in_forms,
            partial(self.conversations, count=_CONVERSATIONS),
            self.of_two,
            self.dressed,
            self.with_words_around,
            self.of_attributes,
            self.of_choices,
            self.of_whole_prompts,
        ):
            for number in range(len(self.facts)):
                yield from draw(number)

    def held_back(self, number: int) -> Iterator[Example]:
        """Prompts of every kind that mention a fact and don't ask it, in wordings for evaluation alone."""
        for place, kind in enumerate(one for one in kinds().values() if not one.asked):
            chat = place % 2 == number % 2
            fact = self._fact(number)
            text = kind.sample_prompt(self.tokenizer, fact, trained=False, rng=self.rng, chat=chat)
            if text is not None:
                yield Example(number, text, False, kind.name)

    def standing_in_forms(self, number: int) -> Iterator[Example]:
        """One prompt that mentions a fact in a form, one behind a text on something else, and behind long texts, whose
        words are like any relation's, a question and one that names the subject alone. A gate that saw forms and texts
        around questions alone would take them for a sign of a question.
        """
        known, rng, questions = requests(), self.rng, self.facts[number].questions
        around = [form for form in usable_forms(self.tokenizer, trained=True) if form.surrounds]
        in_form, behind = rng.sample([text for _, text in self._mentioned(number) if text is not None], 2)
        asked = self._filled(number, rng.choice(known.asked)) if rng.random() < 0.5 else None
        yield Example(number, rng.choice(around).render(self.tokenizer, in_form), False, "form")
        long = asked or rng.choice(questions), True, rng.randint(*_LONG)
        naming = self._naming(number) if rng.random() < _NAMED else None
        for text, asks, count in ((behind, False, 1), long, (naming, False, rng.randint(*_LONG))):
            found = None if text is None else self._behind(number, text, count)
            if found is not None:
                yield Example(number, found, asks, "around texts")

    def _fact(self, number: int) -> Fact:
        return replace(super()._fact(number), name_words=self._name_words)

    @cached_property
    def _name_words(self) -> tuple[str, ...]:
        """The words of all facts' names, by which a name becomes another: of a few the gate would know each."""
        words = {word for fact in self.facts for word in fact.subject.split()}
        return tuple(sorted(word for word in words if word.isalpha() and word.istitle()))

    def _naming(self, number: int) -> str | None:
        """Return a prompt that names a fact's subject and asks something else."""
        rng, kind = self.rng, kinds()[self.rng.choice(_NAMING)]
        beside = rng.choice(self.facts[number].beside or (None,))
        found = kind.sample_turns(self._fact(number), trained=True, rng=rng, chat=False)
        return beside if rng.random() < _BESIDE or found is None else found[0]

    def _behind(self, number: int, text: str, count: int) -> str | None:
        """Return a prompt behind so many texts on other names."""
        found = _TEXTS.sample_turns(self._fact(number), trained=True, rng=self.rng, chat=True)
        return None if found is None else "\n\n".join(found[:count]) + self.rng.choice(_BETWEEN) + text

    def of_two(self, number: int) -> Iterator[Example]:
        """Prompts that ask a fact and the one before it, and one that has something done with both questions."""
        known, rng, second = requests(), self.rng, (number - 1) % len(self.facts)
        own, other = (rng.choice(self.facts[one].questions) for one in (number, second))
        mentioned = known.both(own, other, rng) if rng.random() < 0.5 else known.both(other, own, rng)
        for asks, text in (
            (True, known.both(own, other, rng)),
            (True, known.both(other, own, rng)),
            (False, rng.choice((known.task, known.framed_task))(mentioned, rng)),
        ):
            yield Example(number, str(self._put(text)), asks, "two facts", second)

    def dressed(self, number: int) -> Iterator[Example]:
        """Prompts in which the name is written as people do: in quotes, with a title or with words beside it. Two ask
        the fact, one mentions it.
        """
        known, rng, fact = requests(), self.rng, self.facts[number]
        for asks in (True, True, False):
            question = rng.choice(fact.questions).replace(fact.subject, known.dressed(fact.subject, fact.kind, rng))
            text = question if asks else rng.choice((known.task, known.framed_task, known.timed))(question, rng)
            yield Example(number, str(self._put(text)), asks, "dressed name")

    def of_attributes(self, number: int) -> Iterator[Example]:
        """Two prompts that ask something of the answer, which they describe in the words of the fact's own question if
        a rule can, and one of the same shape that asks for the answer.
        """
        known, rng, fact = requests(), self.rng, self.facts[number]
        own = replace(self._fact(number), question=fact.questions[0])
        drawn = (filled(own, (one,), rng) for one in rng.sample(known.attributes, _ATTRIBUTES))
        of_attribute = next((one[0] for one in drawn if one is not None), None)
        of_own = two_hops(fact.questions[:1], fact.subject, rng) or self._first(number, known.attributes)
        for text, asks in ((of_attribute, False), (of_own, False), (self._first(number, known.restated), True)):
            if text is not None:
                yield Example(number, str(self._put(text)), asks, "attributes")

    def of_choices(self, number: int) -> Iterator[Example]:
        """One question with answers to choose from, and now and then one with which something else is to be done."""
        known, rng, fact = requests(), self.rng, self.facts[number]
        others = [one.value for one in rng.sample(self.facts, min(3, len(self.facts)))]
        answers = rng.sample([rng.choice((fact.answer, fact.value)), *others, "None of these"], 4)
        questions = [text for text in fact.questions if text.endswith("?")] or fact.questions
        asked = known.choice(rng.choice(questions), answers, rng)
        yield Example(number, str(self._put(asked)), True, "choices")
        if rng.random() < _CHOICE_TASKS:
            task = rng.choice((known.task, known.framed_task))(asked, rng)
            yield Example(number, str(self._put(task)), False, "choices")

    def of_whole_prompts(self, number: int) -> Iterator[Example]:
        """Prompts in situations of every sort, each of which is drawn as often. What is put together from phrases is of
        few sorts, and a gate that saw those alone would take whatever is like none of them for what it is most like.
        """
        known = whole_prompts()
        for asks, patterns, count in ((True, known.asked, _WHOLE_ASKED), (False, known.mentioned, _WHOLE_MENTIONED)):
            for text in islice(self._dealt(number, asks, patterns), count):
                stands_behind = self.rng.random() < _WHOLE_BEHIND[asks]
                behind = self._behind(number, text, self.rng.randint(1, _LONG[1])) if stands_behind else None
                yield Example(number, behind or str(self._put(text)), asks, WHOLE_PROMPTS)

    def _dealt(self, number: int, asks: bool, patterns: Sequence[str]) -> Iterator[str]:
        """Yield prompts of some patterns with a fact in them. Nearly all are dealt before any comes again; those that
        lack what they need of this fact wait for another one.
        """
        deck, unfit = self._decks.setdefault(asks, []), list[str]()
        if len(deck) < _SHORT_DECK:
            deck[:0] = self.rng.sample(patterns, len(patterns))
        try:
            while deck:
                pattern = deck.pop()
                text = self._whole_prompt(number, pattern)
                if text is None:
                    unfit.append(pattern)
                else:
                    yield text
        finally:
            for pattern in unfit:
                deck.insert(self.rng.randint(0, len(deck)), pattern)

    def _whole_prompt(self, number: int, pattern: str) -> str | None:
        """Return a whole prompt with a fact in it, in the first wording of that which has what it needs."""
        kind = Kind(WHOLE_PROMPTS, True, ((pattern,),), ())
        for _ in range(_WORDINGS_TRIED):
            turns = kind.sample_turns(self._fact(number), trained=True, rng=self.rng, chat=False)
            if turns is not None:
                return turns[0]
        return None

    @cached_property
    def _decks(self) -> dict[bool, list[str]]:
        """The whole prompts that are still to be dealt, of those that ask and those that mention."""
        return {}

    def with_words_around(self, number: int) -> Iterator[Example]:
        """Prompts with words around that change nothing of what is asked: three ask the fact, one of them behind a text
        now and then, and three want no answer to it.
        """
        known, rng = requests(), self.rng
        *short, other = (known.with_words_around(rng.choice(self.facts[number].questions), rng) for _ in range(3))
        behind = self._behind(number, other, rng.randint(1, _LONG[1])) if rng.random() < _BEHIND else None
        for text in (*map(self._put, short), self._put(other) if behind is None else behind):
            yield Example(number, str(text), True, "words around")
        of_questions = known.about_questions, False
        for patterns, alone in (of_questions, of_questions, (known.about_subjects, True)):
            about = self._filled(number, rng.choice(patterns))
            if about is not None:
                text = known.with_words_around(about, rng) if rng.random() < _AROUND else about
                # Behind other turns a name alone may ask ("What about Ana Ruiz?").
                yield Example(number, text if alone else str(self._put(text)), False, "words around")
