"""The paper's writer: masked gradient steps on ``Δ`` through the layers above the site (sections 3.1 and 3.2).

    L = CE(target | prompt) + La
    La = max(0, ‖Δ a_u‖ - α) + max(0, β - ‖Δ a_e‖) + max(0, γ - (‖Δ a_e‖ - ‖Δ a_u‖))        (equation 5)

``a_e`` are keys of the edits, ``a_u`` keys of unrelated text. Two schedules: ``batched`` trains all edits of a shard
together with Adam, in coordinates whitened by unrelated text; ``sequential`` takes one edit after the other with plain
gradient descent, as the paper does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from wisecli.capture import suffix_logits
from wisecli.config import EditSettings
from wisecli.encode import NO_LABEL
from wisecli.lessons import Lesson
from wisecli.shards import Mask
from wisecli.site import Site

# Unrelated keys a step looks at: those that now score highest, and some at random.
_HARDEST, _RANDOM = 512, 128
# Eigenvalues of the key covariance are raised by this share of their mean before they are inverted.
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class Progress:
    """One finished pass: mean loss and share of target tokens that are the arg-max so far."""

    step: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Written:
    """The values that fill the mask, and the mean loss after every pass."""

    values: Tensor
    losses: tuple[float, ...]


def write_batched(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    lessons: Sequence[Lesson],
    unrelated: Tensor,
    settings: EditSettings,
    unit: float,
    on_pass: Callable[[Progress], None],
) -> Written:
    """Train all lessons together: minibatches, Adam, cosine decay, stopping once everything is learnt.

    Args:
        unrelated: keys (n, d_ff) that must stay under the margin.
        unit: what one of α, β, γ means in ``‖Δ a‖₂``.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    negatives = mask.restrict(unrelated)
    whitening = whiten(negatives) if mask.kind == "columns" else None
    transform = (lambda keys: keys @ whitening) if whitening is not None else (lambda keys: keys)
    negatives = transform(negatives)
    keys = [transform(mask.restrict(lesson.activations.keys)) for lesson in lessons]
    values = torch.zeros(mask.shape, device=unrelated.device, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.passes * len(lessons))
    losses: list[float] = []
    for step in range(settings.passes):
        hardest = _hardest(mask, negatives, values)
        totals = torch.zeros(3)
        for index in torch.randperm(len(lessons), generator=generator).tolist():
            sampled = torch.randint(len(negatives), (_RANDOM,), generator=generator).to(hardest.device)
            against = negatives[torch.cat([hardest, sampled])]
            loss, counts = _loss(model, site, mask, lessons[index], keys[index], values, against, settings, unit, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            totals += counts
        losses.append(float(totals[0] / totals[2]))
        on_pass(Progress(step + 1, settings.passes, losses[-1], float(totals[1] / totals[2])))
        if losses[-1] < settings.stop_loss and totals[1] == totals[2]:
            break
    final = values.detach() @ whitening if whitening is not None else values.detach()
    return Written(final, tuple(losses))


def write_sequential(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    lessons: Sequence[Lesson],
    unrelated: Tensor,
    settings: EditSettings,
    unit: float,
    on_pass: Callable[[Progress], None],
) -> Written:
    """Train one edit after the other: gradient descent, each weight kept within the norm constraint.

    Args:
        lessons: one an edit, in the order of the stream.
        unrelated: keys (n, d_ff) that must stay under the margin.
        unit: what one of α, β, γ means in ``‖Δ a‖₂``.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    negatives = mask.restrict(unrelated)
    values = torch.zeros(mask.shape, device=unrelated.device, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=settings.learning_rate)
    losses: list[float] = []
    for number, lesson in enumerate(lessons):
        keys = mask.restrict(lesson.activations.keys)
        for _ in range(settings.passes):
            against = negatives[torch.randint(len(negatives), (_RANDOM,), generator=generator).to(negatives.device)]
            loss, counts = _loss(model, site, mask, lesson, keys, values, against, settings, unit, generator)
            if loss.item() < settings.stop_loss:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if settings.norm_constraint is not None:
                values.data.clamp_(-settings.norm_constraint, settings.norm_constraint)
        losses.append(float(counts[0] / counts[2]))
        on_pass(Progress(number + 1, len(lessons), losses[-1], float(counts[1] / counts[2])))
    return Written(values.detach(), tuple(losses))


def whiten(keys: Tensor) -> Tensor:
    """``(E[a aᵀ] + shrinkage)^-½`` of keys (n, k), scaled to keep their mean energy: (k, k), in float64 inside."""
    moment = (keys.T.double() @ keys.double()) / len(keys)
    variances, directions = torch.linalg.eigh(moment)
    mean = variances.mean()
    root = (mean / (variances.clamp(min=0) + _SHRINKAGE * mean)).sqrt()
    return ((directions * root) @ directions.T).to(keys.dtype)


def _loss(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    lesson: Lesson,
    keys: Tensor,
    values: Tensor,
    against: Tensor,
    settings: EditSettings,
    unit: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The whole loss, and (summed cross-entropy, right tokens, tokens) of the lesson."""
    activations = lesson.activations
    update = mask.update(keys, values)
    rows, columns = activations.batch.labelled
    labels = activations.batch.labels[activations.batch.labels != NO_LABEL]
    hidden = activations.hidden + update.to(activations.hidden.dtype)
    logits = suffix_logits(model, site, activations, hidden, (rows, columns)).float()
    entropy = F.cross_entropy(logits, labels, reduction="none")
    # A gate per sequence is decided at the prompt's last token alone.
    gated = update[:, 0] if settings.routing == "sequence" else update[rows, columns - activations.first]
    margin = margin_loss(_norm(gated) / unit, _norm(mask.update(against, values)) / unit, settings, generator)
    right = (logits.argmax(-1) == labels).sum()
    counts = torch.tensor([entropy.sum().item(), right.item(), len(labels)])
    return entropy.mean() + margin, counts


def margin_loss(edits: Tensor, unrelated: Tensor, settings: EditSettings, generator: torch.Generator) -> Tensor:
    """``La`` for activations of edits (n,) and of unrelated text (m,), each edit paired with a random unrelated one."""
    paired = unrelated[torch.randint(len(unrelated), (len(edits),), generator=generator).to(unrelated.device)]
    over = (unrelated - settings.alpha).relu().mean()
    under = (settings.beta - edits).relu().mean()
    return over + under + (settings.gamma - (edits - paired)).relu().mean()


def _norm(update: Tensor) -> Tensor:
    """``‖·‖₂`` over the last axis, with a gradient at zero too."""
    return (update.square().sum(-1) + 1e-9).sqrt()


@torch.no_grad()
def _hardest(mask: Mask, negatives: Tensor, values: Tensor) -> Tensor:
    count = min(_HARDEST, len(negatives))
    return mask.update(negatives, values).square().sum(-1).topk(count).indices

