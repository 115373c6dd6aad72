"""How well a model with some delta gives the targets of training examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wisecli.artifacts.shard import Mask
from wisecli.editing.training_examples import Lesson
from wisecli.models.activations import Activations, suffix_logits
from wisecli.models.objectives import allowed, met, missed
from wisecli.models.site import Site


@torch.no_grad()
def said(model: PreTrainedModel, site: Site, part: Activations, hidden: Tensor) -> list[Tensor]:
    """For each row, where the arg-max is as it should be (1 or 0) when ``hidden`` leaves the edited layer."""
    rows, columns = part.batch.labelled
    correct = met(suffix_logits(model, site, part, hidden, (rows, columns)), part.batch).float()
    return [correct[rows == row] for row in range(len(part.batch.ids))]


@torch.no_grad()
def unedited_losses(model: PreTrainedModel, site: Site, lessons: Sequence[Lesson]) -> dict[int, float]:
    """Summed loss of each edit's target in the unedited model, by the edit's number."""
    losses: dict[int, float] = {}
    for lesson in lessons:
        part = lesson.activations
        rows, columns = part.batch.labelled
        logits = suffix_logits(model, site, part, part.hidden, (rows, columns)).float()
        each = missed(logits, part.batch, allowed(model, site, part)).cpu()
        for edit, loss in zip(lesson.edits[rows.cpu()].tolist(), each.tolist(), strict=True):
            losses[edit] = losses.get(edit, 0.0) + loss
    return losses


@torch.no_grad()
def learnt(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    values: Tensor,
    lessons: Sequence[Lesson],
    *,
    context: int | None = 0,
) -> dict[int, float]:
    """Share of each edit's target tokens that are the arg-max (of an erased one, where none is), by its number.

    Args:
        context: the one to look at, by default the bare prompt; ``None`` looks at all.
    """
    right: dict[int, list[Tensor]] = {}
    for lesson in lessons:
        chosen = torch.arange(len(lesson.contexts))
        if context is not None:
            chosen = (lesson.contexts == context).nonzero().flatten()
        if not len(chosen):
            continue
        part = lesson.activations.rows(chosen.to(lesson.activations.keys.device))
        hidden = part.with_update(mask.update(mask.restrict(part.keys), values))
        for edit, correct in zip(lesson.edits[chosen].tolist(), said(model, site, part, hidden), strict=True):
            right.setdefault(edit, []).append(correct)
    return {edit: float(torch.cat(parts).mean()) for edit, parts in right.items()}
