"""Ways to ask a question, and to mention it without asking it, put together from packaged words."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from wisecli.data.corpus import PEOPLE, SLOT, capital, notes, small
from wisecli.data.packaged import packaged_table

# What stands for a text in patterns.
_TEXT = re.compile(r"(?<![^\W_])T(?![^\W_])")
# How often a task is a label.
_LABELLED = 0.4
# How often two questions are one sentence.
_IN_ONE_SENTENCE = 0.15
# Whether something stands before a question and behind it, and how often each way is drawn.
_AROUND, _AROUND_WEIGHTS = ((True, False), (False, True), (True, True)), (2, 4, 1)
# How often two openings stand before a question, or two closings behind it.
_TWO = 0.25
# How often a person's name has a title.
_TITLED = 0.5
# How often another time is told by something that happened then.
_OF_OCCASIONS = 0.4


@dataclass(frozen=True)
class Requests:
    """Ways to ask a question (``asked``) and prompts that mention one, as patterns with the slots of kinds.

    An answer is asked for by one of ``answers`` with one of ``manners``, in ``answer_frames``, some of which call the
    question one of ``items``. Of ``several`` questions the first has one of ``first_ordinals``, others one of
    ``later_ordinals``. Questions stand ``around`` texts.
    What mentions one has something done with it (``mentioned``), wants a yes or no (``checks``) or goes on from its
    answer (``hops``), or asks for one of its ``attributes``, beside which the question is ``restated`` by a noun
    phrase. One has answers to choose from in ``choices``. An answer is ``begun``, and texts are put ``begun_around``
    the question. A task is one of ``verbs`` on a text, in one of ``frames``, which names the text by ``nouns`` before
    it and by ``backs`` behind it; or one of ``labels`` in ``label_frames``. ``times``, and ``occasions`` in
    ``occasion_frames``, are phrases of other times than ``presents``, ``adjectives`` words that ask for another time or
    holder than now. Chats begin with ``systems``, ``turns`` and ``replies``. A conversation that ``begins`` with a
    subject ``refers`` to it, ``corrects`` whom it asks about, or ``leaves`` it. Names are written in ``dresses`` or
    behind ``titles``. Questions have ``openings`` before them and ``closings`` behind them. What is
    ``about_questions`` or ``about_subjects`` wants no answer to them. A slot with the name of one of ``phrases`` stands
    for any of its texts; ``other_task`` is a task on something else than the question.
    """

    asked: tuple[str, ...]
    answers: tuple[str, ...]
    manners: tuple[str, ...]
    answer_frames: tuple[str, ...]
    items: tuple[str, ...]
    several: tuple[str, ...]
    first_ordinals: tuple[str, ...]
    later_ordinals: tuple[str, ...]
    around: tuple[str, ...]
    mentioned: tuple[str, ...]
    checks: tuple[str, ...]
    hops: tuple[str, ...]
    attributes: tuple[str, ...]
    choices: tuple[str, ...]
    restated: tuple[str, ...]
    begun: tuple[str, ...]
    begun_around: tuple[str, ...]
    verbs: tuple[str, ...]
    labels: tuple[str, ...]
    label_frames: tuple[str, ...]
    nouns: tuple[str, ...]
    backs: tuple[str, ...]
    frames: tuple[str, ...]
    presents: tuple[str, ...]
    times: tuple[str, ...]
    occasions: tuple[str, ...]
    occasion_frames: tuple[str, ...]
    adjectives: tuple[str, ...]
    systems: tuple[str, ...]
    turns: tuple[str, ...]
    replies: tuple[str, ...]
    begins: tuple[str, ...]
    refers: tuple[str, ...]
    corrects: tuple[str, ...]
    leaves: tuple[str, ...]
    dresses: tuple[str, ...]
    titles: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    about_questions: tuple[str, ...]
    about_subjects: tuple[str, ...]
    phrases: Mapping[str, tuple[str, ...]]

    def spelled_out(self, pattern: str, rng: random.Random) -> str:
        """Return a pattern with a phrase drawn for each slot that stands for one; phrases may have such slots, too."""

        def phrase(slot: re.Match[str]) -> str:
            name = small(slot[1])
            if name not in self.phrases:
                return slot[0]
            text = self.spelled_out(rng.choice(self.phrases[name]), rng)
            return text if name == slot[1] else capital(text)

        return SLOT.sub(phrase, pattern)

    def instructed(self, question: str, rng: random.Random) -> str:
        """Return a question with a word on how to answer it, or on which one it is."""
        do = f"{rng.choice(self.answers)} {rng.choice(self.manners)}".strip()
        return self._framed(rng.choice(self.answer_frames), question, do, rng)

    def framed_task(self, question: str, rng: random.Random) -> str:
        """Return a prompt that wants something done with a question, in words that stand around questions, too."""
        frames = [frame for frame in self.answer_frames if "{do}" in frame.lower()]
        return self._framed(
            rng.choice(frames), question, _with_text(rng.choice(self.verbs), rng.choice(self.nouns)), rng
        )

    def _framed(self, frame: str, question: str, do: str, rng: random.Random) -> str:
        number, more = sorted(rng.sample(range(1, 40), 2))
        item = rng.choice(self.items).replace("{number}", str(number)).replace("{more}", str(more))
        words = {"do": do, "Do": capital(do), "item": item, "question": question}
        return SLOT.sub(lambda slot: words[slot.group(1)], frame)

    def one_of_several(self, question: str, rng: random.Random) -> str:
        """Return what is left of several questions without the others."""
        announced = rng.choice(self.several)
        joint = rng.choice((" ", " ", "\n")) if announced else ""
        return f"{announced}{joint}{rng.choice(self.first_ordinals + self.later_ordinals)}{question}"

    def both(self, first: str, second: str, rng: random.Random) -> str:
        """Return two questions one behind the other, or in one sentence."""
        announced, joint = rng.choice(self.several), rng.choice((" ", " ", "\n"))
        if rng.random() < _IN_ONE_SENTENCE and first.rstrip().endswith("?"):
            asked = f"{first.rstrip()[:-1]}, and {small(second)}"
        else:
            ordinals = rng.choice(self.first_ordinals), rng.choice(("", *self.later_ordinals))
            asked = f"{ordinals[0]}{first}{joint}{ordinals[1]}{second}"
        return f"{announced}{joint}{asked}" if announced else asked

    def task(self, question: str, rng: random.Random) -> str:
        """Return a prompt that wants something done with a question."""
        if rng.random() < _LABELLED:
            words = {"label": rng.choice(self.labels), "question": question}
            return SLOT.sub(lambda slot: words[slot.group(1)], rng.choice(self.label_frames))
        verb, frame = rng.choice(self.verbs), rng.choice(self.frames)
        task, back = (_with_text(verb, rng.choice(named)) for named in (self.nouns, self.backs))
        words = {"task": task, "Task": capital(task), "back": back, "Back": capital(back), "question": question}
        return SLOT.sub(lambda slot: words[slot.group(1)], frame)

    def choice(self, question: str, answers: Sequence[str], rng: random.Random) -> str:
        """Return a question with four answers to choose from, or with the first three of them."""
        words = {"question": question, **dict(zip("abcd", answers, strict=True))}
        return SLOT.sub(lambda slot: words[slot.group(1)], rng.choice(self.choices))

    def timed(self, question: str, rng: random.Random) -> str:
        """Return a question that is asked of another time."""
        drawn = {
            "year": str(rng.randint(1850, 2018)),
            "decade": str(10 * rng.choice((192, 195, 197, 198, 199))),
            "number": str(rng.randint(1, 30)),
            "future": str(rng.randint(2030, 2090)),
        }
        happened = _with_text(rng.choice(self.occasion_frames), rng.choice(self.occasions))
        when = happened if rng.random() < _OF_OCCASIONS else rng.choice(self.times)
        return _at(question, SLOT.sub(lambda slot: drawn[slot.group(1)], when), rng)

    def with_words_around(self, text: str, rng: random.Random) -> str:
        """Return a text with something before it, behind it or both, as people write to those whom they ask; the
        beginning of a statement has nothing behind it.
        """
        before, behind = True, False
        if text.rstrip()[-1:] in "?.!":
            before, behind = rng.choices(_AROUND, _AROUND_WEIGHTS)[0]
        if before:
            text = f"{self._one_or_two(self.openings, rng)} {text}"
        if not behind:
            return text
        closing = self._one_or_two(self.closings, rng)
        return text + closing if closing.startswith("\n") else f"{text} {closing}"

    def _one_or_two(self, patterns: tuple[str, ...], rng: random.Random) -> str:
        """Return one of some patterns, spelled out, or two of them, one behind the other."""
        drawn = rng.sample(patterns, 2 if rng.random() < _TWO else 1)
        return " ".join(self.spelled_out(pattern, rng) for pattern in drawn)

    def dressed(self, name: str, kind: str, rng: random.Random) -> str:
        """Return a name in quotes, with a title or with words beside it, as people write names of such a kind."""
        if kind in PEOPLE and rng.random() < _TITLED:
            return f"{rng.choice(self.titles)} {name}"
        return _with_text(SLOT.sub(kind, rng.choice(self.dresses)), name)

    def reply(self, rng: random.Random) -> str:
        """Return what an assistant has said to something else."""
        return rng.choice((rng.choice(self.replies), rng.choice(notes().notes)[0]))

    def now(self, question: str, rng: random.Random) -> str:
        """Return a question that is asked of the time that it is of without any."""
        return _at(question, rng.choice(self.presents), rng)


def _with_text(pattern: str, text: str) -> str:
    """Return a pattern with a text where "T" stands for it."""
    return _TEXT.sub(lambda _: text, pattern)


def _at(question: str, when: str, rng: random.Random) -> str:
    """Return a question with a phrase that says of which time it is asked; before a statement that it would end."""
    if not question.rstrip().endswith("?"):
        return f"{capital(when)}, {small(question)}"
    stem = question.rstrip("?. ")
    ways = (f"{stem} {when}?", f"{capital(when)}, {small(question)}", f"{question} I mean {when}.")
    return rng.choices(ways, (9, 7, 4))[0]


@dataclass(frozen=True)
class WholePrompts:
    """Prompts with the slots of kinds, no two of them in the same words: such as are ``asked``, so that the fact in
    their slots answers them, and such as have it ``mentioned`` and want something else.
    """

    asked: tuple[str, ...]
    mentioned: tuple[str, ...]


@cache
def whole_prompts() -> WholePrompts:
    """Return all packaged prompts that were written as a whole."""
    return WholePrompts(**{name: tuple(rows) for name, rows in packaged_table("whole_prompts.toml").items()})


@cache
def requests() -> Requests:
    """Return all packaged ways to ask a question or to mention it."""
    phrases, ways = (
        {name: tuple(rows) for name, rows in packaged_table(table).items()}
        for table in ("phrases.toml", "requests.toml")
    )
    phrases["other_task"] = tuple(_with_text(verb, "{object}") for verb in ways["verbs"])
    return Requests(phrases=phrases, **ways)
