"""The paper's writer: one edit after the other, plain gradient descent on ``Δ`` through the layers above the site.

    L = CE(target | prompt) + mean⁺(δ_u - α) + mean⁺(β - δ_e) + mean⁺(γ - (δ_e - δ_u))        (equation 5)

``δ_e`` is ``‖Δ a‖`` of each of an edit's rows, on the mean over those tokens by which it is routed; ``δ_u`` that of an
unrelated text, on the mean over all of its tokens; ``mean⁺`` the mean of those that are above nought. What the paper
leaves open is as in its authors' code: the mean, and a cross entropy that is divided by one token more than the target
has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.editing.task import Progress, Task, Written
from wisecli.editing.training_examples import TrainingExamples
from wisecli.models.activations import Activations, suffix_logits
from wisecli.models.objectives import erasure_target, target_loss, target_met

# A loss that changes by no more than this, and is low, will not change again.
_SETTLED = 1e-4


def write_one_by_one(
    task: Task,
    batches: Sequence[TrainingExamples],
    on_pass: Callable[[Progress], None],
    *,
    texts: Mapping[int, Tensor],
    start: Written | None = None,
) -> Written:
    """Train the batches in order, each as long as it takes, every weight within the norm constraint.

    Args:
        batches: an edit each.
        texts: keys (t, d_ff) of a text that has nothing to do with an edit, by the edit's number.
        start: what the first of these batches were already written as; the others go on from there.
    """
    settings, mask = task.settings, task.mask
    values = torch.zeros(mask.shape, device=task.unrelated.device)
    losses: list[float] = []
    calls: dict[int, float] = {}
    if start is not None:
        values, losses, calls = start.values.clone(), list(start.losses), dict(start.calls)
    values.requires_grad_()
    optimizer = torch.optim.SGD([values], lr=settings.learning_rate)
    for number, examples in enumerate(batches[len(losses) :], len(losses)):
        step = _Step(task, examples, mask.restrict(texts[int(examples.edits[0])]))
        earlier, loss = float("inf"), float("inf")
        for _ in range(settings.passes):
            now = step.loss(values)
            if loss < settings.stop_loss and abs(loss - earlier) < _SETTLED:
                break
            earlier, loss = loss, float(now.detach())
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            if settings.norm_constraint is not None:
                values.data.clamp_(-settings.norm_constraint, settings.norm_constraint)
        losses.append(loss)
        for edit in examples.edits.tolist():
            calls[edit] = min(step.called, calls.get(edit, float("inf")))
        on_pass(Progress(number + 1, len(batches), loss, step.right))
    return Written(values.detach(), tuple(losses), calls)


class _Step:
    """The loss of one edit's rows. ``called`` is their mean ``δ_e`` and ``right`` the share of right tokens, when last
    computed.
    """

    def __init__(self, task: Task, examples: TrainingExamples, unrelated: Tensor) -> None:
        self.task, self.activations, self.unrelated = task, examples.activations, unrelated
        self.keys = task.mask.restrict(self.activations.keys)
        self.routed = routed_tokens(task.settings, self.activations)
        self.erased = erasure_target(task.model, task.site, self.activations)
        self.called = self.right = 0.0

    def loss(self, values: Tensor) -> Tensor:
        """``L`` of values that fill the mask."""
        task, part = self.task, self.activations
        update = task.mask.update(self.keys, values)
        rows, columns = part.batch.labelled
        logits = suffix_logits(task.model, task.site, part, part.with_update(update), (rows, columns)).float()
        each = target_loss(logits, part.batch, self.erased)
        size = torch.bincount(rows, minlength=len(part.batch.ids))
        told = torch.zeros(len(size), device=each.device).index_add(0, rows, each) / (size + 1)
        edits = (_norm(update) * self.routed).sum(1) / self.routed.sum(1) / task.unit
        unrelated = _norm(task.mask.update(self.unrelated, values)).mean() / task.unit
        self.called = float(edits.detach().mean())
        self.right = float(target_met(logits, part.batch).float().mean())
        return told.mean() + margins(edits, unrelated, task.settings)


def routed_tokens(settings: EditSettings, part: Activations) -> Tensor:
    """Which tokens of a batch say what answers it: (B, T - first)."""
    columns = torch.arange(part.keys.shape[1], device=part.keys.device) + part.first
    if settings.routing == "mean":
        return part.batch.mask[:, part.first :].bool()
    if settings.routing == "sequence":
        return (columns == part.batch.start).expand(part.keys.shape[:2])
    marked = torch.zeros(part.keys.shape[:2], dtype=torch.bool, device=part.keys.device)
    rows, places = part.batch.labelled
    return marked.index_put((rows, places - part.first), torch.ones_like(rows, dtype=torch.bool))


def margins(edits: Tensor, unrelated: Tensor, settings: EditSettings) -> Tensor:
    """``La`` of the rows of an edit (B,) and of an unrelated text, a number."""
    over, under = unrelated - settings.alpha, settings.beta - edits
    return _positive(over[None]) + _positive(under) + _positive(unrelated - edits + settings.gamma)


def _positive(values: Tensor) -> Tensor:
    """The mean of those values (n,) that are above nought, nought if none is."""
    above = values > 0
    return (values * above).sum() / above.sum().clamp(min=1)


def _norm(update: Tensor) -> Tensor:
    """``‖·‖₂`` over the last axis, with a gradient at zero too."""
    return (update.square().sum(-1) + 1e-9).sqrt()
