"""The paper's writer: one edit after the other, plain gradient descent on ``Δ`` through the layers above the site.

    L = CE(target | prompt) + mean⁺(δ_u - α) + mean⁺(β - δ_e) + mean⁺(γ - (δ_e - δ_u))        (equation 5)

``δ_e`` is ``‖Δ a‖`` of each of an edit's rows, on the mean over the tokens that count; ``δ_u`` that of an unrelated
text, on the mean over all of its tokens; ``mean⁺`` the mean of those that are above zero. What the paper
leaves open is as in its authors' code: the mean, and a cross entropy that is divided by one token more than the target
has. With ``norm_of`` ``activated`` the norm is ``‖σ(W a + Δ a) - σ(W a)‖``. With ``weight_decay`` every weight of
``W + Δ`` shrinks at each step, those outside the mask too: ``Δ`` is ``(s - 1) W`` besides what fills the mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings
from wisecli.editing.writers.edit_pass import EditPass
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.models.running.losses import erasure_target, target_loss, target_met
from wisecli.models.running.upper_layers import upper_logits

# A loss that changes by no more than this, and is low, will not change again.
_SETTLED = 1e-4


def write_sequential(
    task: WriterTask, passes: Sequence[EditPass], on_pass: Callable[[Progress], None], *, start: Written | None = None
) -> Written:
    """Train on the passes in order, each as long as it takes, every weight within the norm constraint.

    Args:
        start: what the first of these passes were already written as; the others go on from there.
    """
    settings = task.settings
    dtype = torch.promote_types(task.unrelated.dtype, torch.float32)
    values = torch.zeros(task.mask.shape, dtype=dtype, device=task.unrelated.device)
    losses: list[float] = []
    calls: dict[int, float] = {}
    kept = 1.0
    if start is not None:
        values, losses, calls, kept = start.values.clone(), list(start.losses), dict(start.calls), start.kept
    values.requires_grad_()
    optimizer = torch.optim.SGD([values], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    for number, own in enumerate(passes[len(losses) :], len(losses)):
        step = Step(task, own)
        earlier, loss = float("inf"), float("inf")
        for _ in range(settings.passes):
            now = step.loss(values, kept)
            if loss < settings.stop_loss and abs(loss - earlier) < _SETTLED:
                break
            earlier, loss = loss, float(now.detach())
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            kept *= 1 - settings.learning_rate * settings.weight_decay
            if settings.norm_constraint is not None:
                values.data.clamp_(-settings.norm_constraint, settings.norm_constraint)
        losses.append(loss)
        for edit in own.edits:
            calls[edit] = min(step.called, calls.get(edit, float("inf")))
        on_pass(Progress(number + 1, len(passes), loss, step.right))
    return Written(values.detach(), tuple(losses), calls, kept)


def with_changed_mask(task: WriterTask, written: Written) -> tuple[WriterTask, Tensor]:
    """Return the task with the mask of all weights that were changed, and the values that fill it."""
    if written.kept == 1 or task.matrix is None:
        return task, written.values
    mask = task.mask
    whole = mask.dense(written.values) + (written.kept - 1) * task.matrix
    places = torch.arange(mask.d * mask.d_ff, device=whole.device)
    return replace(task, mask=Mask("elements", places, mask.d, mask.d_ff)), whole.flatten()


class Step:
    """The loss of one edit's rows: that of the ``target`` and of the margins (``beyond``).

    These, their rows' mean ``δ_e`` (``called``) and the share of right tokens (``right``) are as last computed.
    """

    def __init__(self, task: WriterTask, own: EditPass) -> None:
        self.task, self.activations, self.counted = task, own.activations, own.counted
        self.keys, self.unrelated = task.mask.restrict(self.activations.keys), task.mask.restrict(own.unrelated)
        self.erased = erasure_target(task.model, task.site, self.activations)
        self.called = self.right = self.target = self.beyond = 0.0
        self.main = self.other = None
        if (matrix := task.matrix) is not None:
            keys = self.activations.keys.to(matrix.dtype), own.unrelated.to(matrix.dtype)
            self.main, self.other = (each @ matrix.T for each in keys)
        self.activation = None
        if task.settings.norm_of == "activated":
            from wisecli.routing.layers.routed_layer import activation_of  # its roles take long to import

            self.activation = activation_of(task.model.config)

    def loss(self, values: Tensor, kept: float = 1.0) -> Tensor:
        """Return ``L`` of values that fill the mask, with so much of ``W`` that is ``kept``."""
        task, part = self.task, self.activations
        update = self._update(self.keys, values, self.main, kept)
        rows, columns = part.batch.labelled
        logits = upper_logits(task.model, task.site, part, part.with_update(update), (rows, columns))
        each = target_loss(logits, part.batch, self.erased)
        size = torch.bincount(rows, minlength=len(part.batch.ids))
        target_losses = each.new_zeros(len(size)).index_add(0, rows, each) / (size + 1)
        called = self._norm(update, self.main)
        edits = (called * self.counted).sum(1) / self.counted.sum(1) / task.unit
        other = self._update(self.unrelated, values, self.other, kept)
        unrelated = self._norm(other, self.other).mean() / task.unit
        beyond = margins(edits, unrelated, task.settings)
        self.called = float(edits.detach().mean())
        self.right = float(target_met(logits, part.batch).float().mean())
        self.target, self.beyond = float(target_losses.detach().mean()), float(beyond.detach())
        return target_losses.mean() + beyond

    def _update(self, keys: Tensor, values: Tensor, main: Tensor | None, kept: float) -> Tensor:
        """Return ``Δ a`` for keys that the mask restricts: (..., k or d_ff) → (..., d)."""
        update = self.task.mask.update(keys, values)
        return update if main is None or kept == 1 else update + (kept - 1) * main

    def _norm(self, update: Tensor, main: Tensor | None) -> Tensor:
        """Return how much an output changes (...), from its change (..., d) and what it was."""
        if self.activation is not None and main is not None:
            update = self.activation(main + update) - self.activation(main)
        length: Tensor = torch.linalg.vector_norm(update, dim=-1)
        return length


def margins(edits: Tensor, unrelated: Tensor, settings: EditSettings) -> Tensor:
    """Return ``La`` of the rows of an edit (B,) and of an unrelated text, a number."""
    over, under = unrelated - settings.alpha, settings.beta - edits
    return _positive(over[None]) + _positive(under) + _positive(unrelated - edits + settings.gamma)


def _positive(values: Tensor) -> Tensor:
    """Return the mean of those values (n,) that are above zero, zero if none is."""
    above = values > 0
    return (values * above).sum() / above.sum().clamp(min=1)
