"""What a relation reader is learned from: made-up facts that are asked and mentioned, and all packaged relations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import Relation, everyday_prompts, further_relations, made_up_subjects, relations
from wisecli.data.request_wordings import requests
from wisecli.export.stock.backgrounds import Background, backgrounds
from wisecli.models.prompts.chat_template import chat_turns
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import encode
from wisecli.models.prompts.typos import LEARNED_TYPOS, with_typos
from wisecli.models.synthetic.request_examples import Example, Examples
from wisecli.models.synthetic.synthetic_facts import SyntheticFact, synthetic_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How often a relation's wording is misspelt.
_MISSPELT = 0.25
# How often an answer stands after a prompt, asked or not; and how often one to something else, if it is not.
_ANSWERED, _ELSE = 0.5, 0.5
# Sorts of examples that ask nothing because of a name alone, which is for detectors to tell.
_OF_NAMES = ("near name", "correction")
# Names of each kind that relations are asked of.
_NAMES = 40
# So many relations are always read.
_FEWEST = 8
# So many everyday prompts, and backgrounds of questions, are drawn from.
_EVERYDAY, _BACKGROUNDS = 400, 32


class RowKind(Enum):
    """What a row is: a fact's own prompt in a form, a prompt that asks or mentions a fact, or a relation's wording."""

    OWN = 0
    EXAMPLE = 1
    RELATION = 2


class ReaderRow(NamedTuple):
    """Tokens of a prompt and, after it, of an answer or none; ``prompt`` is how many are the prompt's.

    ``fact`` is the number of a made-up fact, or -1; ``asks`` says whether the prompt asks it. If it is known from which
    token on nothing is asked, that is ``closed``, which is 0 otherwise.
    """

    tokens: tuple[int, ...]
    prompt: int
    kind: RowKind
    relation: int
    fact: int = -1
    asks: bool = True
    closed: int = 0


@dataclass(frozen=True)
class RowSettings:
    """How many ``facts`` are made up, how many ``examples`` of each ask it and as many mention it, how ``longest`` a
    prompt is in tokens, which ``share`` of all relations is read beside, and how many more examples of each sort have
    other texts ``around`` them.
    """

    facts: int = 400
    examples: int = 9
    longest: int = 640
    share: float = 1.0
    around: int = 2


def reader_rows(tokenizer: PreTrainedTokenizerBase, settings: RowSettings, rng: random.Random) -> list[ReaderRow]:
    """Return the rows that a relation reader is learned from."""
    known = [*relations(), *further_relations()]
    facts = list(synthetic_facts(settings.facts, rng, known))
    examples, everyday = Examples(tokenizer, facts, rng), everyday_prompts(_EVERYDAY, seed=3)
    others = backgrounds(tokenizer, _BACKGROUNDS, seed=3)
    rows: list[ReaderRow] = []
    for number, fact in enumerate(facts):
        for form in usable_forms(tokenizer, trained=True):
            tokens = tuple(tokenizer(form.render(tokenizer, fact.questions[0]))["input_ids"])
            rows.append(ReaderRow(tokens, len(tokens), RowKind.OWN, fact.relation, number))
        drawn = [*_sample(examples, number, settings.examples), *_around(examples, number, others, settings.around)]
        read = [(example, _answered(tokenizer, fact, example, rng)) for example in drawn]
        rows += (row for example, row in read if example.asks or example.sort not in _OF_NAMES)
        for example, told in _moved_on(examples, number, everyday):
            row = _answered(tokenizer, fact, example, rng)
            rows.append(row if example.asks else row._replace(closed=_tokens_up_to(tokenizer, example.text, told)))
    rows += _of_relations(tokenizer, known[: max(_FEWEST, round(settings.share * len(known)))], rng)
    return [row for row in rows if row.prompt <= settings.longest]


def _answered(
    tokenizer: PreTrainedTokenizerBase, fact: SyntheticFact, example: Example, rng: random.Random
) -> ReaderRow:
    """Return the row of a prompt around a fact, with its answer or without, or with a reply to something else."""
    said = requests().reply(rng) if not example.asks and rng.random() < _ELSE else fact.answer
    row = encode(tokenizer, example.text, said)
    answer = row.target if rng.random() < _ANSWERED else ()
    return ReaderRow(
        (*row.prompt, *answer), len(row.prompt), RowKind.EXAMPLE, fact.relation, example.fact, example.asks
    )


def _sample(examples: Examples, number: int, count: int) -> Iterator[Example]:
    """Yield ``count`` prompts that ask a fact, ``count`` that mention it, and conversations."""
    drawn = list(examples.of(number))
    examples.rng.shuffle(drawn)
    for asks in (True, False):
        yield from [example for example in drawn if example.asks == asks][:count]
    yield from examples.conversations(number)


def _around(examples: Examples, number: int, texts: Sequence[Background], count: int) -> Iterator[Example]:
    """Yield prompts with other texts around them: ``count`` that ask a fact, and as many that ask something else."""
    known, rng, questions = requests(), examples.rng, examples.facts[number].questions
    for _ in range(count):
        for text, asks in (
            (rng.choice(questions), True),
            (rng.choice((known.task, known.timed))(rng.choice(questions), rng), False),
        ):
            yield Example(number, rng.choice(texts).around(examples.tokenizer, text, rng), asks, "around")


def _moved_on(examples: Examples, number: int, everyday: Sequence[str]) -> Iterator[tuple[Example, str]]:
    """Yield chats of questions, each with the last answer; a chat asks the fact only if the last question does."""
    if not examples.tokenizer.chat_template:
        return
    rng, fact, *others = examples.rng, *(examples.facts[number - place] for place in range(3))
    own, other, further = ((rng.choice(known.questions), known.answer) for known in (fact, *others))
    for told, then, asks in (
        ([own], rng.choice(everyday), False),
        ([own], other[0], False),
        ([other], own[0], True),
        ([further, other], own[0], True),
        ([other, own], rng.choice(everyday), False),
    ):
        turns = [(role, text) for pair in told for role, text in zip(("user", "assistant"), pair, strict=True)]
        text = chat_turns(examples.tokenizer, [*turns, ("user", then)])
        yield Example(number, text, asks, "moved on"), told[-1][1]


def _tokens_up_to(tokenizer: PreTrainedTokenizerBase, text: str, said: str) -> int:
    """Return how many tokens a text has up to the end of what an assistant said last in it."""
    end = text.rfind(said) + len(said)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return sum(first < end for first, _ in offsets)


def _of_relations(
    tokenizer: PreTrainedTokenizerBase, known: Sequence[Relation], rng: random.Random
) -> Iterator[ReaderRow]:
    """Yield every wording of relations, about a made-up name in a trained form."""
    trained = usable_forms(tokenizer, trained=True)
    names = {kind: made_up_subjects(kind, _NAMES, rng) for kind in dict.fromkeys(fact.kind for fact in known)}
    for number, relation in enumerate(known):
        for wording in relation.wordings:
            text = wording.replace("{}", rng.choice(names[relation.kind]))
            if rng.random() < _MISSPELT:
                text = with_typos(text, rng.choice(LEARNED_TYPOS), rng) or text
            tokens = tuple(tokenizer(rng.choice(trained).render(tokenizer, text))["input_ids"])
            yield ReaderRow(tokens, len(tokens), RowKind.RELATION, number)
