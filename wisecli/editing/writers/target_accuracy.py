"""How well a model with some delta gives the targets of training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.artifacts.shard import Mask
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.models.layout.site import Site
from wisecli.models.running.activations import Activations
from wisecli.models.running.losses import erasure_target, target_loss, target_met
from wisecli.models.running.upper_layers import upper_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def targets_met(model: PreTrainedModel, site: Site, part: Activations, hidden: Tensor) -> list[Tensor]:
    """Return, for each row, where the arg-max is right (1 or 0) when ``hidden`` leaves the edited layer."""
    rows, columns = part.batch.labelled
    correct = target_met(upper_logits(model, site, part, hidden, (rows, columns)), part.batch).float()
    return [correct[rows == row] for row in range(len(part.batch.ids))]


@torch.no_grad()
def unedited_losses(model: PreTrainedModel, site: Site, batches: Sequence[TrainingExamples]) -> dict[int, float]:
    """Return the summed loss of each edit's target in the unedited model, by the edit's number."""
    losses: dict[int, float] = {}
    for examples in batches:
        part = examples.activations
        rows, columns = part.batch.labelled
        logits = upper_logits(model, site, part, part.hidden, (rows, columns)).float()
        each = target_loss(logits, part.batch, erasure_target(model, site, part)).cpu()
        for edit, loss in zip(examples.edits[rows.cpu()].tolist(), each.tolist(), strict=True):
            losses[edit] = losses.get(edit, 0.0) + loss
    return losses


@torch.no_grad()
def learnt(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    values: Tensor,
    batches: Sequence[TrainingExamples],
    *,
    context: int | None = 0,
) -> dict[int, float]:
    """Return, by edit, the share of target tokens that are the arg-max, or of an erased one whether none is.

    Args:
        context: the one to look at, by default the bare prompt; ``None`` looks at all.
    """
    right: dict[int, list[Tensor]] = {}
    for examples in batches:
        chosen = torch.arange(len(examples.contexts))
        if context is not None:
            chosen = (examples.contexts == context).nonzero().flatten()
        if not len(chosen):
            continue
        part = examples.activations.rows(chosen.to(examples.activations.keys.device))
        hidden = part.with_update(mask.update(mask.restrict(part.keys), values))
        for edit, correct in zip(examples.edits[chosen].tolist(), targets_met(model, site, part, hidden), strict=True):
            right.setdefault(edit, []).append(correct)
    return {edit: float(torch.cat(parts).mean()) for edit, parts in right.items()}
