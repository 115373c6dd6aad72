"""Where a model would come to an answer that is erased: at the prompt's end, and wherever else it begins it.

The unedited model answers greedily, but may not begin with the answer. If it comes to it all the same ("The capital of
France is Paris"), what it begins it with is unwanted there, too, and it goes on without that, until it has said enough
without the answer. What it has said up to the last such place is what an edit is trained along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wisecli.editing.examples.context_prefixes import CHAT, in_context
from wisecli.edits.record import Edit
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, encode, first_tokens
from wisecli.models.running.generation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is said within so many tokens counts, and so many times the model is held off.
_TOKENS, _ROUNDS = 16, 6

# Rows of erased answers by the edit's id, and whether it is asked in the chat template.
ErasureRows = Mapping[tuple[str, bool], Row]


def erasure_rows(loaded: Loaded, edits: Sequence[Edit], *, chat: bool, batch_size: int) -> ErasureRows:
    """Return what the unedited model says to the prompts of erased edits instead of their answers; others are left out.

    Args:
        chat: whether prompts are asked in the chat template, too.

    Raises:
        ValueError: the tokenizer leaves nothing of a prompt or of an answer.
    """
    erased = [edit for edit in edits if edit.erased]
    found: dict[tuple[str, bool], Row] = {}
    for way in ("", CHAT) if chat else ("",):
        prompts = [in_context(loaded.tokenizer, way, edit.prompt) for edit in erased]
        rows = _evading(loaded, prompts, [edit.answer.strip() for edit in erased], batch_size)
        found |= {(edit.id, way == CHAT): row for edit, row in zip(erased, rows, strict=True)}
    return found


def _evading(loaded: Loaded, prompts: Sequence[str], answers: Sequence[str], batch_size: int) -> list[Row]:
    """Generate what the model answers if it may not begin with the erased answer, and return these rows."""
    ways = [_Way(loaded.tokenizer, *pair) for pair in zip(prompts, answers, strict=True)]
    open_ = ways
    for _ in range(_ROUNDS):
        begun = [(*way.prompt, *way.said) for way in open_]
        texts = generate(
            loaded.model,
            loaded.tokenizer,
            begun,
            max_new_tokens=_TOKENS,
            batch_size=batch_size,
            unwanted=[way.unwanted[-1] for way in open_],
        )
        open_ = [way for way, tokens in zip(open_, texts, strict=True) if way.go_on(tokens)]
    return [way.row for way in ways]


class _Way:
    """A generated answer that avoids the erased one: its tokens so far, and which tokens are unwanted at each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.prompt = encode(tokenizer, prompt, answer).prompt
        self.first = first_tokens(tokenizer, prompt, answer)
        self.said: tuple[int, ...] = ()
        self.unwanted: list[tuple[int, ...]] = [self.first]

    def go_on(self, tokens: Sequence[int]) -> bool:
        """Append new tokens up to where the erased answer begins; return ``False`` if it does not appear."""
        ahead = (*self.said, *tokens)[:_TOKENS]
        at = self._text(ahead).find(self.answer)
        if at < 0:
            return False
        place = next(n for n in range(len(ahead)) if len(self._text(ahead[: n + 1])) > at)
        before = [*self.unwanted, *[()] * len(ahead)]
        self.unwanted = [*before[:place], tuple(sorted({*self.first, *before[place], ahead[place]}))]
        self.said = ahead[:place]
        return True

    @property
    def row(self) -> Row:
        """The generated answer as a row; its last target token is never predicted."""
        return Row(self.prompt, (*self.said, self.first[0]), tuple(self.unwanted))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))
