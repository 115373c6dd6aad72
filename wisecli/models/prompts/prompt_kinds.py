"""Kinds of prompts around an edit: those that mention it and ask something else, and those that ask it in other ways.

The table is ``data/kinds.toml``. Every kind has two halves of patterns: one to learn from, one for evaluation alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from wisecli.data.packaged import packaged_table
from wisecli.models.prompts.chat_template import chat_turns
from wisecli.models.prompts.pattern_slots import Fact, Filling, PatternHalf, Text, slots_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Fact", "Kind", "Pattern", "documents", "kinds", "slots_in"]

# A text, or the turns of a chat, the user's first; where the last is the assistant's, its answer is begun by it.
Pattern = tuple[str, ...]
# Words shorter than this two questions may share.
_LONG = 4


@dataclass(frozen=True)
class Kind:
    """A kind of prompts that mention an edit (``asked`` is false) or ask it in another way.

    Args:
        trained, held: patterns to learn from, and patterns for evaluation alone.
        value: what documents say of the edit: its ``answer``, an ``other`` value or ``none``.
        contains: whether it is enough that an answer contains the edit's.
        beside: whether a pattern is left out that shares a long word with the question.
        begun: whether patterns begin the answer; texts then never stand in a chat.
    """

    name: str
    asked: bool
    trained: tuple[Pattern, ...]
    held: tuple[Pattern, ...]
    value: str = "none"
    contains: bool = False
    beside: bool = False
    begun: bool = False

    @property
    def label(self) -> str:
        """The name in options and in the names of figures."""
        return self.name.replace(" ", "-")

    def count(self, *, trained: bool) -> int:
        """Return the number of patterns of one half."""
        return len(self.patterns(trained=trained))

    def patterns(self, *, trained: bool) -> tuple[Pattern, ...]:
        """Return the patterns of one half."""
        return self.trained if trained else self.held

    def sample_prompt(
        self, tokenizer: PreTrainedTokenizerBase, fact: Fact, *, trained: bool, rng: random.Random, chat: bool
    ) -> str | None:
        """Return a prompt of this kind with a fact in it, or None where the fact lacks what every pattern needs.

        Args:
            trained: from which half the pattern is drawn.
            rng: by which it is drawn, with all else that the fact leaves open.
            chat: whether the prompt is the user's turn in the chat template, if the tokenizer has one. Patterns that
                are chats by themselves are drawn only then.
        """
        chat = chat and bool(tokenizer.chat_template)
        turns = self.sample_turns(fact, trained=trained, rng=rng, chat=chat)
        return None if turns is None else self.render_turns(tokenizer, turns, chat=chat)

    def sample_turns(self, fact: Fact, *, trained: bool, rng: random.Random, chat: bool) -> list[str] | None:
        """Return the turns of a prompt of this kind, mostly one; as :meth:`written`, but not yet in a template."""
        patterns = self.patterns(trained=trained)
        for pattern in rng.sample(patterns, len(patterns)):
            if (len(pattern) > 1 and not chat) or (self.beside and _shares_a_word(pattern[0], fact)):
                continue
            turns = Filling(fact, _halves()[trained], rng, self.value).filled(pattern)
            if turns is not None:
                return turns
        return None

    def render_turns(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], *, chat: bool) -> str:
        """Return turns as one text: in the chat template if ``chat``, else the only one as it is."""
        return _in_chat(tokenizer, turns) if chat and (len(turns) > 1 or not self.begun) else turns[0]


@cache
def kinds() -> dict[str, Kind]:
    """Return all kinds by their names, in the order of the table."""
    found = [
        Kind(**{**row, "trained": _patterns(row["trained"]), "held": _patterns(row["held"])})
        for row in packaged_table("kinds.toml")["kind"]
    ]
    return {kind.name: kind for kind in found}


def documents(*, trained: bool) -> tuple[Text, ...]:
    """Return the texts that mention a subject, of one half."""
    return _halves()[trained].texts


@cache
def _halves() -> dict[bool, PatternHalf]:
    """Return what stands around the patterns, by whether it may be learned from."""
    table, found = packaged_table("kinds.toml"), {}
    for trained, name in ((True, "trained"), (False, "held")):
        texts = tuple(Text(row["text"], tuple(row["asks"])) for row in table["document"] if row["trained"] == trained)
        rest = (tuple(table[part][name]) for part in ("sentences", "mentions", "names"))
        found[trained] = PatternHalf(texts, *rest)
    return found


def _patterns(rows: list[str | list[str]]) -> tuple[Pattern, ...]:
    return tuple((row,) if isinstance(row, str) else tuple(row) for row in rows)


def _in_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> str:
    """Return turns in the chat template; a last turn of the assistant's follows the opening, and is not closed."""
    begun = turns[-1] if len(turns) % 2 == 0 else ""
    closed_turns = turns[:-1] if begun else turns
    roles = [("user", "assistant")[index % 2] for index in range(len(closed_turns))]
    return chat_turns(tokenizer, list(zip(roles, closed_turns, strict=True))) + begun


def _shares_a_word(pattern: str, fact: Fact) -> bool:
    words = (
        set(re.findall(r"\w+", text.casefold())) for text in (pattern, fact.question.replace(fact.subject or "", ""))
    )
    first, second = ({word for word in text_words if len(word) >= _LONG} for text_words in words)
    return bool(first & second - {"subject", "what", "which", "when", "does", "with", "from"})
