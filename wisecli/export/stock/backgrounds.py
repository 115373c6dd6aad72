"""What may stand around a question: packaged pages and notes, and conversations on everyday matters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wisecli.data.corpus import everyday_prompts, notes, reference_pages
from wisecli.data.request_wordings import requests
from wisecli.models.prompts.chat_template import chat_turns
from wisecli.models.synthetic.request_documents import in_paragraphs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many sentences a page of notes has, how many reference pages stand together, and how often a page is of those; how
# many turns a conversation's user had.
_PAGE, _REFERENCE, _OF_REFERENCE, _TURNS = (6, 24), (1, 4), 0.5, (1, 3)
# How often a page that may stand on either side of a question stands before it.
_BEFORE = 0.5
# So many everyday prompts are drawn from.
_EVERYDAY = 200


@dataclass(frozen=True)
class Background:
    """A ``page`` around a question, or "", and the turns before it; in a ``chat`` the question is a user's turn."""

    page: str
    turns: tuple[tuple[str, str], ...]
    chat: bool

    def before(self, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
        """Return a prompt in which this stands before a question."""
        return self._turn(tokenizer, f"{self.page}\n\n{question}" if self.page else question)

    def around(self, tokenizer: PreTrainedTokenizerBase, question: str, rng: random.Random) -> str:
        """Return a prompt in which this stands before a question, or a page after it."""
        if not self.page or rng.random() < _BEFORE:
            return self.before(tokenizer, question)
        return self._turn(tokenizer, f"{question}\n\n{self.page}")

    def _turn(self, tokenizer: PreTrainedTokenizerBase, asked: str) -> str:
        return chat_turns(tokenizer, [*self.turns, ("user", asked)]) if self.chat else asked


def backgrounds(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int) -> list[Background]:
    """Return ``count`` backgrounds: pages, pages in a chat, conversations in turn; without a template only pages."""
    rng, everyday = random.Random(seed), everyday_prompts(_EVERYDAY, seed=seed)
    found = []
    for number in range(count):
        chat = bool(tokenizer.chat_template) and number % 3 > 0
        talk = chat and number % 3 == 2
        found.append(Background("" if talk else _page(rng), _turns(everyday, rng) if talk else (), chat))
    return found


def _page(rng: random.Random) -> str:
    if rng.random() < _OF_REFERENCE:
        return "\n\n".join(reference_pages(rng.randint(*_REFERENCE), seed=rng.randrange(1 << 30)))
    known = notes().notes
    sentences = [text for text, _ in rng.sample(known, min(len(known), rng.randint(*_PAGE)))]
    return "\n\n".join(in_paragraphs(sentences, rng))


def _turns(everyday: list[str], rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Return a user's turns on something else, each with a reply."""
    known, told = requests(), list[tuple[str, str]]()
    for _ in range(rng.randint(*_TURNS)):
        told += [("user", rng.choice(rng.choice((known.turns, everyday)))), ("assistant", known.reply(rng))]
    return tuple(told)
