"""How residuals do at the strength that a lookup serves them with.

Residuals are fitted so that they just do, and served somewhat stronger, as what just does after an edit's own prompt is
too little after some rephrases (``wise merge strength``). Rarely an answer does not bear that: its residual is kept
smaller by as much, so that it is served as it was fitted.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from wisecli.config import MergeSettings
from wisecli.editing.evidence.attention_sinks import residual_scale
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.target_accuracy import targets_met
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.models.running.activations import Activations

STRENGTH = MergeSettings().strength

# The residuals (positions, d) of each answer.
Residuals = dict[AnswerKey, Tensor]


def serving_scale(part: Activations, task: WriterTask, strength: float = 1.0) -> Tensor:
    """Return how many times a residual is added at every state (B, T - first).

    Where attention rests it is stretched, and as strong as a lookup serves it already as it is fitted: other states
    take a stronger residual than they need; of these it decides what they say.
    """
    times = residual_scale(part, task.median_state_norm)
    return torch.where(times == 1, strength, times * STRENGTH)


def bare_prompt_accuracy(
    task: WriterTask, batches: Sequence[TrainingExamples], residuals: Residuals, strength: float = 1.0
) -> dict[int, float]:
    """Return, by edit, the share of target tokens that its residuals make the arg-max after its bare prompt."""
    shares: dict[int, float] = {}
    for examples in batches:
        bare = (examples.contexts == 0).nonzero().flatten()
        right = _right(task, examples, bare, residuals, strength)
        shares |= {edit: float(share.mean()) for edit, share in zip(examples.edits[bare].tolist(), right, strict=True)}
    return shares


def weakened_where_needed(
    task: WriterTask, batches: Sequence[TrainingExamples], residuals: Residuals, strength: float = STRENGTH
) -> Residuals:
    """Return the residuals, divided by ``strength`` for the answers that are then right in more contexts."""
    wrong = _wrong(task, batches, residuals, residuals.keys(), strength)
    lesser = {answer: residuals[answer] / strength for answer in wrong}
    still = _wrong(task, batches, lesser, wrong.keys(), strength)
    return residuals | {answer: lesser[answer] for answer in wrong if still[answer] < wrong[answer]}


def _wrong(
    task: WriterTask,
    batches: Sequence[TrainingExamples],
    residuals: Residuals,
    answers: Collection[AnswerKey],
    strength: float,
) -> Counter[AnswerKey]:
    """Return the number of rows with a wrong token in the answer, by answer."""
    found: Counter[AnswerKey] = Counter()
    for examples in batches:
        rows = torch.tensor([row for row, answer in enumerate(examples.answers) if answer in answers], dtype=torch.long)
        right = _right(task, examples, rows, residuals, strength)
        found.update(examples.answers[row] for row, each in zip(rows.tolist(), right, strict=True) if each.min() < 1)
    return found


@torch.no_grad()
def _right(
    task: WriterTask, examples: TrainingExamples, rows: Tensor, residuals: Residuals, strength: float
) -> list[Tensor]:
    """Return where the tokens of some rows' targets are the arg-max (1 or 0), row by row."""
    if not len(rows):
        return []
    part = examples.activations
    if len(rows) < len(examples.answers):
        part = part.rows(rows.to(part.keys.device))
    update = torch.zeros_like(part.hidden)
    for place, row in enumerate(rows.tolist()):
        own = residuals[examples.answers[row]]
        update[place, : len(own)] = own.to(update.dtype)
    update *= serving_scale(part, task, strength)[..., None]
    return targets_met(task.model, task.site, part, part.with_update(update))
