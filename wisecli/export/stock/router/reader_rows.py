"""What a relation reader is learned from: made-up facts that are asked and mentioned, and all packaged relations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from wisecli.data.corpus import everyday_prompts, made_up_subjects, relations
from wisecli.models.prompts.chat_template import chat_turns
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import encode
from wisecli.models.synthetic.request_examples import Example, Examples
from wisecli.models.synthetic.synthetic_facts import synthetic_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How often the fact's answer stands behind a prompt, asked or not.
_ANSWERED = 0.5
# Names of each kind that relations are asked of.
_NAMES = 40
# So many relations are always read.
_FEWEST = 8
# So many everyday prompts are drawn from.
_EVERYDAY = 400


class RowKind(Enum):
    """What a row is: a fact's own prompt in a form, a prompt that asks or mentions a fact, or a relation's wording."""

    OWN = 0
    EXAMPLE = 1
    RELATION = 2


class ReaderRow(NamedTuple):
    """Tokens of a prompt and, behind it, of an answer or none; ``prompt`` is how many are the prompt's.

    ``fact`` is the number of a made-up fact, or -1; ``asks`` says whether the prompt asks it.
    """

    tokens: tuple[int, ...]
    prompt: int
    kind: RowKind
    relation: int
    fact: int = -1
    asks: bool = True


@dataclass(frozen=True)
class RowSettings:
    """How many ``facts`` are made up, how many ``examples`` of each ask it and as many mention it, how ``longest`` a
    prompt is in tokens, and which ``share`` of all relations is read beside.
    """

    facts: int = 400
    examples: int = 9
    longest: int = 320
    share: float = 1.0


def reader_rows(tokenizer: PreTrainedTokenizerBase, settings: RowSettings, rng: random.Random) -> list[ReaderRow]:
    """Return the rows that a relation reader is learned from."""
    facts = list(synthetic_facts(settings.facts, rng))
    examples, everyday = Examples(tokenizer, facts, rng), everyday_prompts(_EVERYDAY, seed=3)
    rows = [
        row
        for number in range(len(facts))
        for row in _of_fact(tokenizer, examples, number, everyday, settings.examples)
    ]
    rows += _of_relations(tokenizer, settings.share, rng)
    return [row for row in rows if row.prompt <= settings.longest]


def _of_fact(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, number: int, everyday: Sequence[str], count: int
) -> Iterator[ReaderRow]:
    """Yield a fact's own prompt in all trained forms, so many prompts that ask it and as many that mention it."""
    fact, rng = examples.facts[number], examples.rng
    for form in usable_forms(tokenizer, trained=True):
        tokens = tuple(tokenizer(form.render(tokenizer, fact.questions[0]))["input_ids"])
        yield ReaderRow(tokens, len(tokens), RowKind.OWN, fact.relation, number)
    drawn = list(examples.of(number))
    rng.shuffle(drawn)
    chosen = [one for asks in (True, False) for one in [x for x in drawn if x.asks == asks][:count]]
    moved = _moved_on(examples, number, everyday)
    for one in (*chosen, *examples.conversations(number), *moved):
        row = encode(tokenizer, one.text, fact.answer)
        behind = row.target if rng.random() < _ANSWERED else ()
        yield ReaderRow((*row.prompt, *behind), len(row.prompt), RowKind.EXAMPLE, fact.relation, number, one.asks)


def _moved_on(examples: Examples, number: int, everyday: Sequence[str]) -> Iterator[Example]:
    """Yield chats of two questions, of which one asks a fact: the chat asks it only if that is the last one."""
    if not examples.tokenizer.chat_template:
        return
    rng, fact, other = examples.rng, examples.facts[number], examples.facts[number - 1]
    unrelated, question = rng.choice(everyday), rng.choice(fact.questions)
    for first, said, then, asks in (
        (question, fact.answer, unrelated, False),
        (question, fact.answer, rng.choice(other.questions), False),
        (rng.choice(other.questions), other.answer, question, True),
    ):
        turns = [("user", first), ("assistant", said), ("user", then)]
        yield Example(number, chat_turns(examples.tokenizer, turns), asks, "moved on")


def _of_relations(tokenizer: PreTrainedTokenizerBase, share: float, rng: random.Random) -> Iterator[ReaderRow]:
    """Yield every wording of a share of all relations, about a made-up name in a trained form."""
    known, trained = relations(), usable_forms(tokenizer, trained=True)
    names = {kind: made_up_subjects(kind, _NAMES, rng) for kind in dict.fromkeys(one.kind for one in known)}
    for number, relation in enumerate(known[: max(_FEWEST, round(share * len(known)))]):
        for wording in relation.wordings:
            text = wording.replace("{}", rng.choice(names[relation.kind]))
            tokens = tuple(tokenizer(rng.choice(trained).render(tokenizer, text))["input_ids"])
            yield ReaderRow(tokens, len(tokens), RowKind.RELATION, number)
