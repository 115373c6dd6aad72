"""Masked gradient steps on ``Δ`` through the layers above the site, for all edits of a shard together.

    L = CE(target | prompt) + La        (where an answer is erased, the loss of :mod:`wisecli.models.running.losses`)
    La = max(0, ‖Δ a_u‖ - α) + max(0, β - ‖Δ a_e‖) + max(0, γ - (‖Δ a_e‖ - ‖Δ a_u‖))        (equation 5)

``a_e`` are keys of the edits, ``a_u`` keys of unrelated text (sections 2.3.1 and 2.3.2). Adam, in coordinates
whitened by unrelated text; one edit after the other, as the paper has it, is :mod:`wisecli.editing.writers.paper_sgd`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.models.running.losses import erasure_target, target_loss, target_met
from wisecli.models.running.upper_layers import upper_logits

# Background keys a step looks at: those that score highest in this pass, and some at random.
_HARDEST, _RANDOM = 512, 128
# Eigenvalues of the key covariance are raised by this share of their mean before they are inverted.
_SHRINKAGE = 0.1


def write_batched(
    task: WriterTask,
    batches: Sequence[TrainingExamples],
    on_pass: Callable[[Progress], None],
    *,
    start: Tensor | None = None,
) -> Written:
    """Train all batches together: minibatches, Adam, cosine decay, stopping once everything is learnt.

    Args:
        start: values to begin from; zero by default.
    """
    settings, mask = task.settings, task.mask
    generator = torch.Generator().manual_seed(settings.seed)
    negatives = mask.restrict(task.unrelated)
    turn = whiten(negatives) if mask.kind == "columns" else None
    negatives = _turned(negatives, turn)
    keys = [_turned(mask.restrict(examples.activations.keys), turn) for examples in batches]
    values = torch.zeros(mask.shape, device=negatives.device)
    if start is not None:
        values = start.clone() if turn is None else torch.linalg.solve(turn, start, left=False)
    values.requires_grad_()
    optimizer = torch.optim.Adam([values], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.passes * len(batches))
    losses: list[float] = []
    for step in range(settings.passes):
        hardest = _hardest(mask, negatives, values)
        totals = torch.zeros(3, device=values.device)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            drawn = _drawn(len(negatives), _RANDOM, generator, negatives.device)
            against = torch.cat([hardest, negatives[drawn]])
            loss, counts = _loss(task, batches[index], keys[index], values, against, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            totals += counts
        losses.append(float(totals[0] / totals[2]))
        on_pass(Progress(step + 1, settings.passes, losses[-1], float(totals[1] / totals[2])))
        if losses[-1] < settings.stop_loss and totals[1] == totals[2]:
            break
    return Written(_turned(values.detach(), turn), tuple(losses))


def margin_loss(edits: Tensor, unrelated: Tensor, settings: EditSettings, generator: torch.Generator) -> Tensor:
    """Return ``La`` for activations of edits (n,), each paired at random with one of unrelated text (m,)."""
    paired = unrelated[_drawn(len(unrelated), len(edits), generator, unrelated.device)]
    over = (unrelated - settings.alpha).relu().mean()
    under = (settings.beta - edits).relu().mean()
    return over + under + (settings.gamma - (edits - paired)).relu().mean()


def whiten(keys: Tensor) -> Tensor:
    """Return ``(E[a aᵀ] + shrinkage)^-½`` (k, k) of keys (n, k), in float64, scaled to keep their mean energy."""
    moment = (keys.T.double() @ keys.double()) / len(keys)
    variances, directions = torch.linalg.eigh(moment)
    mean = variances.mean()
    root = (mean / (variances.clamp(min=0) + _SHRINKAGE * mean)).sqrt()
    whitening: Tensor = (directions * root) @ directions.T
    return whitening.to(keys.dtype)


def _loss(
    task: WriterTask,
    examples: TrainingExamples,
    keys: Tensor,
    values: Tensor,
    against: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the whole loss, and (summed loss of the targets, right tokens, tokens) of the examples."""
    activations, mask = examples.activations, task.mask
    update = mask.update(keys, values)
    rows, columns = activations.batch.labelled
    hidden = activations.with_update(update)
    logits = upper_logits(task.model, task.site, activations, hidden, (rows, columns)).float()
    # Kept for all batches, what erased answers leave to be said would take more room than the batches.
    each = target_loss(logits, activations.batch, erasure_target(task.model, task.site, activations))
    gated = update[:, 0]  # a prompt's last token decides
    unrelated = mask.update(against, values)
    margin = margin_loss(_norm(gated) / task.unit, _norm(unrelated) / task.unit, task.settings, generator)
    right = target_met(logits, activations.batch).sum()
    # Stays on the device: who reads it waits for all that was asked before.
    return each.mean() + margin, torch.stack([each.detach().sum(), right, torch.full_like(right, len(each))])


def _turned(tensor: Tensor, turn: Tensor | None) -> Tensor:
    return tensor if turn is None else tensor.to(turn.dtype) @ turn


def _norm(update: Tensor) -> Tensor:
    """Return ``‖·‖₂`` over the last axis, with a gradient at zero too."""
    return (update.square().sum(-1) + 1e-9).sqrt()


def _drawn(among: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return random indices (count,) drawn on the CPU and sent without waiting for the device."""
    return torch.randint(among, (count,), generator=generator).to(device, non_blocking=True)


@torch.no_grad()
def _hardest(mask: Mask, negatives: Tensor, values: Tensor) -> Tensor:
    count = min(_HARDEST, len(negatives))
    return negatives[mask.update(negatives, values).square().sum(-1).topk(count).indices]
