"""What made-up chats have before their last turn."""

import random
from collections.abc import Sequence

from wisecli.data.request_wordings import requests
from wisecli.models.synthetic.synthetic_facts import SyntheticFact

# How often an earlier turn is about a made-up fact, and how often a chat has a system prompt.
_ON_FACTS, _SYSTEMS = 0.35, 0.4


def chat_history(facts: Sequence[SyntheticFact], everyday: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Return what a chat has before the last turn, as roles and texts: a system prompt or none, and up to three turns
    with replies.

    Args:
        everyday: prompts that ask something else altogether.
    """
    told = [("system", rng.choice(requests().systems))] if rng.random() < _SYSTEMS else []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        told += zip(("user", "assistant"), _earlier(facts, everyday, rng), strict=True)
    return told


def _earlier(facts: Sequence[SyntheticFact], everyday: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Return a user's turn on something else, and what was replied."""
    known, way = requests(), rng.random()
    if way < _ON_FACTS:
        fact = rng.choice(facts)
        stated = bool(fact.statements) and rng.random() < 0.5
        said = f"{rng.choice(fact.statements)} {fact.answer}." if stated else fact.answer
        return rng.choice(fact.questions), said
    asked = rng.choice(known.turns if way < 2 * _ON_FACTS else everyday)
    return asked, known.reply(rng)
