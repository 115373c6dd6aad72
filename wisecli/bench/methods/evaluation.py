"""Teacher-forced and generated answers of a method's model, read as a whole: nothing is known of how it was edited."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.base import Method
from wisecli.evaluation.answers import Answer, AnswerBook, Answers, Targets, answered, empty_book
from wisecli.evaluation.metrics import Question
from wisecli.evaluation.teacher_forcing import KNOWN, Measured, Reading
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate, in_batches, row_of
from wisecli.models.running.forward_pass import run_model
from wisecli.models.text_input import vocabulary_size
from wisecli.progress import Event, ProgressCallback, ignore_progress
from wisecli.routing.deciding.prompt_window import UNROUTED


@dataclass(frozen=True)
class TargetPredictions:
    """What a model says at the target tokens of one row: its arg-max (n,), and the loss of each target token (n,)."""

    best: Tensor
    losses: Tensor


@dataclass
class BaseModelAnswers:
    """What the unedited model says and answers, so that it is asked once for all methods."""

    predictions: dict[Row, TargetPredictions] = field(default_factory=dict)
    answers: AnswerBook = field(default_factory=empty_book)


_ROUNDS = 3


@torch.no_grad()
def target_predictions(
    loaded: Loaded,
    rows: Sequence[Row],
    method: Method | None = None,
    *,
    batch_size: int,
    stage: str = "measuring",
    on_progress: ProgressCallback = ignore_progress,
) -> list[TargetPredictions]:
    """Return what the model says given the right tokens before each target token; as edited, if a ``method`` is
    given.
    """
    found: dict[int, TargetPredictions] = {}
    for indices in in_batches(rows, batch_size):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        with nullcontext() if method is None else method.applied(batch.start):
            logits = run_model(loaded.model, batch, batch.labelled)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none").cpu()
        best, at = logits.argmax(-1).cpu(), batch.labelled[0].cpu()
        found |= {index: TargetPredictions(best[at == row], losses[at == row]) for row, index in enumerate(indices)}
        on_progress(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def overhead(edited: Callable[[], object], unedited: Callable[[], object]) -> float:
    """Return how much longer the edited model takes, as a ratio less one: the fastest of some rounds."""
    best = {edited: float("inf"), unedited: float("inf")}
    for _ in range(_ROUNDS):
        for run in (unedited, edited):
            begun = time.perf_counter()
            run()
            best[run] = min(best[run], time.perf_counter() - begun)
    return best[edited] / best[unedited] - 1


class MethodSubject:
    """A method's model, as something to be measured.

    Args:
        known: what the unedited model says, shared by all methods, and filled as it is asked.
        answers: what the edited model answered already, filled as well.
    """

    def __init__(
        self,
        loaded: Loaded,
        method: Method,
        known: BaseModelAnswers,
        *,
        batch_size: int,
        answers: AnswerBook | None = None,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        self.loaded, self.method, self.known = loaded, method, known
        self._answered = empty_book() if answers is None else answers
        self.batch_size, self.on_progress = batch_size, on_progress
        self.tokenizer, self.config = loaded.tokenizer, loaded.model.config
        self._answering: dict[tuple[int, frozenset[int]], Answers] = {}

    def row(self, prompt: str, target: str, erased: bool = False) -> Row:
        """Return a prompt and its answer in tokens, as the unedited model is asked."""
        vocabulary = vocabulary_size(self.loaded.model.config)
        return row_of(self.loaded.tokenizer, prompt, target, erased=erased, vocabulary=vocabulary)

    def teacher_forced(self, pairs: Sequence[Question], *, stage: str) -> list[Measured]:
        """Measure prompts and answers, the right tokens before each token of the answer."""
        measured = partial(
            target_predictions, self.loaded, batch_size=self.batch_size, stage=stage, on_progress=self.on_progress
        )
        rows = [self.row(*pair) for pair in pairs]
        rewritten = [self.row(self.method.rewritten_prompt(pair[0]), *pair[1:]) for pair in pairs]
        new = [row for row in dict.fromkeys(rows) if row not in self.known.predictions]
        self.known.predictions.update(zip(new, measured(new), strict=True))
        after = measured(rewritten, self.method)
        return [
            _measured(self.known.predictions[row], row, edited, other)
            for row, edited, other in zip(rows, after, rewritten, strict=True)
        ]

    def overhead(self, pairs: Sequence[tuple[str, str]]) -> float:
        """Return how much longer one pass over prompts and answers takes; rewording a question is part of it."""

        def edited() -> None:
            rewritten = [self.row(self.method.rewritten_prompt(prompt), target) for prompt, target in pairs]
            target_predictions(self.loaded, rewritten, self.method, batch_size=self.batch_size)

        def unedited() -> None:
            target_predictions(self.loaded, [self.row(*pair) for pair in pairs], batch_size=self.batch_size)

        return overhead(edited, unedited)

    def extra_tokens(self, prompts: Sequence[str]) -> float:
        """Return how many tokens longer prompts become by what the method puts before them, on average."""
        count = [(self._length(self.method.rewritten_prompt(prompt)), self._length(prompt)) for prompt in prompts]
        return statistics.fmean(rewritten - plain for rewritten, plain in count)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int) -> tuple[list[str], list[str]]:
        """Return greedy answers, before and after."""
        answering = self.answering(max_new_tokens)
        before = answering.before(prompts, stage="answers before")
        after = answering.after([self.method.rewritten_prompt(prompt) for prompt in prompts], stage="answers after")
        return [answer.text for answer in before], [answer.text for answer in after]

    def answering(self, max_new_tokens: int, stops: frozenset[int] = frozenset()) -> Answers:
        """Return what answers in up to ``max_new_tokens``; ``stops`` end them, too. All methods share unedited ones."""
        key = max_new_tokens, stops
        if key not in self._answering:
            whole = partial(answered, self.loaded.model, self.tokenizer, max_new_tokens=max_new_tokens, stops=stops)

            def unedited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
                return whole(texts)

            def edited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
                with self.method.applied():
                    return whole(texts)

            self._answering[key] = Answers(
                self.tokenizer,
                unedited,
                edited,
                self.batch_size,
                on_progress=self.on_progress,
                reworded=self.method.rewritten_prompt,
                known_before=self.known.answers[key],
                known_after=self._answered[key],
            )
        return self._answering[key]


def _measured(before: TargetPredictions, row: Row, after: TargetPredictions, rewritten_row: Row) -> Measured:
    alike = len(before.best) == len(after.best)
    same = float((before.best == after.best).float().mean()) if alike else 0.0
    return Measured(_reading(before, row), _reading(after, rewritten_row), same, UNROUTED)


def _reading(predictions: TargetPredictions, row: Row) -> Reading:
    right = row.right(predictions.best.tolist())
    known_share = (predictions.losses < -math.log(KNOWN)).float().mean()
    return Reading(right, float(known_share), float(predictions.losses.mean()))
