"""Greedy answers of a model before and after editing, each text answered once.

A prompt for which no edit opens is answered by the unedited model: the edited one gives the same by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from wisecli.models.prompts.tokenization import Row, in_batches
from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wisecli.models.prompts.prompt_forms import Form
    from wisecli.models.running.prefix_cache import PrefixCache

# Of one batch, with its padding.
_TOKENS = 8192


@dataclass(frozen=True)
class Answer:
    """What a model says to a text, and whether it ``ended`` by itself.

    One that is ``cut`` is none of those that were looked for, and may lack its rest.
    """

    text: str
    ended: bool
    cut: bool = False


KnownAnswers = dict[str, Answer]
# By the most tokens of an answer, and the tokens that end it as well; what is not there yet is made when asked for.
AnswerBook = dict[tuple[int, frozenset[int]], KnownAnswers]
# Of texts, the answers that are looked for; a text that is not among them is answered in full.
Targets = Mapping[str, Collection[str]]
Batch = Callable[[Sequence[str], Targets], list[Answer]]
_ALL: Targets = {}


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
        opened: for which texts an edit opens; without it the edited model may give another answer to any.
        known_before, known_after: what was answered already, by the text; filled as more is asked.
    """

    tokenizer: PreTrainedTokenizerBase
    unedited: Batch
    edited: Batch
    batch_size: int
    on_progress: ProgressCallback = ignore_progress
    reworded: Callable[[str], str] = str
    opened: Callable[[Sequence[str]], list[bool]] | None = None
    known_before: KnownAnswers = field(default_factory=dict)
    known_after: KnownAnswers = field(default_factory=dict)

    def before(self, texts: Sequence[str], *, stage: str = "unedited answers") -> list[Answer]:
        """Return the unedited model's answers to texts."""
        return self._all(texts, self.unedited, self.known_before, stage, _ALL)

    def after(self, texts: Sequence[str], *, stage: str, targets: Targets = _ALL) -> list[Answer]:
        """Return the edited model's answers to texts.

        Args:
            targets: of texts that are asked for nothing but whether one of these is the answer; others may be cut.
        """
        return self._all(texts, self.edited, self.known_after, stage, targets)

    def both(self, pairs: Sequence[tuple[str, str]], *, stage: str) -> list[tuple[Answer, Answer] | None]:
        """Return the edited model's answers to the first texts of pairs, with the unedited one's to the second.

        ``None`` stands where they cannot but be the same.
        """
        changing = self.may_change([text for text, _ in pairs])
        asked = [pair for pair, changes in zip(pairs, changing, strict=True) if changes or pair[0] != pair[1]]
        after = self.after([text for text, _ in asked], stage=stage)
        before = self.before([text for _, text in asked])
        answers = dict(zip(asked, zip(after, before, strict=True), strict=True))
        return [answers.get(pair) for pair in pairs]

    def may_change(self, texts: Sequence[str]) -> list[bool]:
        """Return for which texts the edited model may give another answer than the unedited one."""
        return [True] * len(texts) if self.opened is None else self.opened(texts)

    def edited_text(self, form: Form, prompt: str) -> str:
        """Return what the edited model is asked for a prompt in a form.

        A method that rewords is given what the user writes: the whole text, or of a chat the turn.
        """
        if form.chat:
            return form.render(self.tokenizer, self.reworded(prompt))
        return self.reworded(form.render(self.tokenizer, prompt))

    def _all(
        self, texts: Sequence[str], answer: Batch, known: KnownAnswers, stage: str, targets: Targets
    ) -> list[Answer]:
        """Return answers to texts; new texts are asked in batches of like length."""
        new = [text for text in dict.fromkeys(texts) if text not in known]
        cut: KnownAnswers = {}
        done = 0
        for batch in _batches(self.tokenizer, new, self.batch_size):
            for text, said in zip(batch, answer(batch, targets), strict=True):
                (cut if said.cut else known)[text] = said
            done += len(batch)
            self.on_progress(Event(stage, done, len(new)))
        return [known[text] if text in known else cut[text] for text in texts]


def targets_of(pairs: Iterable[tuple[str, str | None]]) -> Targets:
    """Return the answers that texts are asked for; a text that is asked for more than these, ``None``, has none."""
    found: dict[str, set[str | None]] = {}
    for text, target in pairs:
        found.setdefault(text, set()).add(target)
    return {
        text: {answer for answer in answers if answer is not None}
        for text, answers in found.items()
        if None not in answers
    }


def _batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int) -> Iterator[list[str]]:
    """Yield texts of like length, the longest first: at most ``size`` of them and, above one, a limited number of
    tokens. Those that begin alike stand apart.
    """
    rows = [Row(tuple(tokenizer(text)["input_ids"]), ()) for text in texts]
    batches = in_batches(rows, size, by_beginning=True, padded=False, tokens=_TOKENS)
    for batch in sorted(batches, key=lambda batch: len(rows[batch[-1]]), reverse=True):
        yield [texts[index] for index in reversed(batch)]


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    targets: Targets = _ALL,
    *,
    max_new_tokens: int,
    stops: Collection[int] = (),
    beginnings: PrefixCache | None = None,
) -> list[Answer]:
    """Return greedy answers to one batch of texts, up to their end or to ``max_new_tokens``.

    Args:
        targets: of texts, the answers that are looked for; another is cut where it shows.
        stops: tokens that end an answer as well, and belong to it.
        beginnings: keeps what texts begin with, read once, if the model can go on from what attention keeps of it.
    """
    hopeless = [partial(_differs, tokenizer, _letters(targets[text])) if text in targets else None for text in texts]
    tokens = generate(
        model,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        batch_size=max(1, len(texts)),
        stops=stops,
        hopeless=hopeless,
        beginnings=beginnings,
    )
    said: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    cut = [differs is not None and differs(row) for differs, row in zip(hopeless, tokens, strict=True)]
    return [
        Answer(text.strip(), not vain and (len(row) < max_new_tokens or row[-1] in stops), vain)
        for text, row, vain in zip(said, tokens, cut, strict=True)
    ]


def _letters(texts: Collection[str]) -> tuple[str, ...]:
    """Return the letters and digits of texts, without case."""
    return tuple("".join(filter(str.isalnum, text.casefold())) for text in texts)


def _differs(tokenizer: PreTrainedTokenizerBase, targets: Collection[str], tokens: list[int]) -> bool:
    """Return whether tokens begin no answer with the letters of a target, whatever follows and stands between."""
    (begun,) = _letters([str(tokenizer.decode(tokens, skip_special_tokens=True))])
    return not any(target.startswith(begun) for target in targets)
