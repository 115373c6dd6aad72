"""Greedy answers of a model before and after editing, each text answered once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wisecli.models.prompts.prompt_forms import Form

# Of one batch, with its padding.
_TOKENS = 8192


@dataclass(frozen=True)
class Answer:
    """What a model says to a text, and whether it ``ended`` by itself."""

    text: str
    ended: bool


KnownAnswers = dict[str, Answer]
# By the most tokens of an answer, and the tokens that end it as well; what is not there yet is made when asked for.
AnswerBook = dict[tuple[int, frozenset[int]], KnownAnswers]
Batch = Callable[[Sequence[str]], list[Answer]]


def empty_book() -> AnswerBook:
    """Return a book without answers."""
    return defaultdict(dict)


@dataclass(frozen=True)
class Books:
    """What models answered already, before and after editing; both are filled as more is asked."""

    before: AnswerBook = field(default_factory=empty_book)
    after: AnswerBook = field(default_factory=empty_book)


@dataclass(frozen=True)
class Answers:
    """A model that is asked before and after editing.

    Args:
        unedited, edited: what answers a batch of texts.
        reworded: what the edited model is asked in the place of a prompt, for methods that edit by that.
        known_before, known_after: what was answered already, by the text; filled as more is asked.
    """

    tokenizer: PreTrainedTokenizerBase
    unedited: Batch
    edited: Batch
    batch_size: int
    on_progress: ProgressCallback = ignore_progress
    reworded: Callable[[str], str] = str
    known_before: KnownAnswers = field(default_factory=dict)
    known_after: KnownAnswers = field(default_factory=dict)

    def before(self, texts: Sequence[str], *, stage: str) -> list[Answer]:
        """Return the unedited model's answers to texts."""
        return self._all(texts, self.unedited, self.known_before, stage)

    def after(self, texts: Sequence[str], *, stage: str) -> list[Answer]:
        """Return the edited model's answers to texts."""
        return self._all(texts, self.edited, self.known_after, stage)

    def edited_text(self, form: Form, prompt: str) -> str:
        """Return what the edited model is asked for a prompt in a form.

        A method that rewords is given what the user writes: the whole text, or of a chat the turn.
        """
        if form.chat:
            return form.render(self.tokenizer, self.reworded(prompt))
        return self.reworded(form.render(self.tokenizer, prompt))

    def _all(self, texts: Sequence[str], answer: Batch, known: KnownAnswers, stage: str) -> list[Answer]:
        """Answers to texts, of which new ones are asked, those of like length together."""
        lengths = {text: len(self.tokenizer(text)["input_ids"]) for text in texts if text not in known}
        done = 0
        for some in _batches(lengths, self.batch_size):
            for text, said in zip(some, answer(some), strict=True):
                known[text] = said
            done += len(some)
            self.on_progress(Event(stage, done, len(lengths)))
        return [known[text] for text in texts]


def _batches(lengths: Mapping[str, int], size: int) -> Iterator[list[str]]:
    """Texts of like length, the longest first: at most ``size`` of them and, above one, a limited number of tokens."""
    batch: list[str] = []
    for text in sorted(lengths, key=lambda text: lengths[text], reverse=True):
        if batch and (len(batch) == size or (len(batch) + 1) * lengths[batch[0]] > _TOKENS):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    stops: Collection[int] = (),
) -> list[Answer]:
    """Greedy answers to one batch of texts, up to their end or to so many tokens.

    Args:
        stops: tokens that end an answer as well, and belong to it.
    """
    tokens = generate(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=max(1, len(texts)), stops=stops
    )
    said: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        Answer(text.strip(), len(row) < max_new_tokens or row[-1] in stops)
        for text, row in zip(said, tokens, strict=True)
    ]
