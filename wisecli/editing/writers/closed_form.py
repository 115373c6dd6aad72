"""The closed-form writer: find what each key should add, then solve for the change that adds it.

1. For every edit and target position a residual ``v``, shared by all contexts, that added to the matrix's output makes
   the layers above predict the target: a few steps of Adam through the suffix, until the edit's targets are certain
   (where an answer is erased, until the loss of :mod:`wisecli.models.running.losses` is as small).
2. ``Δ`` from keys and residuals in one solve (:mod:`wisecli.editing.writers.ridge`), its penalty chosen by what a
   context that was held back then answers.
3. If an edit still does not take, or the router needs its margins: a few passes of the true loss from there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import FIRST_LANGUAGE, Evidence
from wisecli.editing.evidence.serving_strength import Residuals, serving_scale
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import NotFiniteError, TrainingExamples
from wisecli.editing.writers.batched_adam import write_batched
from wisecli.editing.writers.ridge import PENALTIES, Penalty, Statistics, solve, statistics
from wisecli.editing.writers.target_accuracy import learnt
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.models.prompts.tokenization import NO_LABEL
from wisecli.models.running.activations import Activations
from wisecli.models.running.losses import erasure_target, target_loss
from wisecli.models.running.upper_layers import upper_logits

# A lighter penalty must be right this much more often to be taken.
_WORTH = 0.005

# The loss of a token that is as likely as all others together.
_UNSURE = math.log(2)

# Rows, the place of each one's answer, and what may be said at the labelled columns of those that erase one.
Part = tuple[Activations, Tensor, Tensor | None]


@dataclass(frozen=True)
class Solved:
    """The values that fill the mask, the penalty that was chosen, and the polish's mean losses."""

    values: Tensor
    penalty: Penalty
    losses: tuple[float, ...]


def fit_residuals(
    task: WriterTask, groups: Sequence[Sequence[TrainingExamples]], on_group: Callable[[Progress], None]
) -> Residuals:
    """Return the residuals (positions, d) of each answer; a group holds all contexts of its edits.

    Raises:
        NotFiniteError: the layers above give no finite loss for some edits.
    """
    found: Residuals = {}
    total = sum(len(_answers(group)) for group in groups)
    for group in groups:
        losses = _fit_group(task, group, found)
        on_group(Progress(len(found), total, losses, float(losses < task.settings.stop_loss)))
    return found


def _answers(group: Sequence[TrainingExamples]) -> list[AnswerKey]:
    """Return the answers of a group, each once, in order."""
    return sorted({answer for examples in group for answer in examples.answers})


def _fit_group(task: WriterTask, group: Sequence[TrainingExamples], found: Residuals) -> float:
    """Fit one group, and return the mean over answers of their worst token's loss at the end.

    Steps take the contexts in turn. An answer is done once every context in turn has found all its tokens certain.
    After ``residual_steps`` only those go on of which some context has found a token likelier wrong than right.
    """
    settings, device = task.settings, task.unrelated.device
    answers = _answers(group)
    contexts = _by_context(task, group, answers)
    positions = max(examples.activations.batch.labels.shape[1] for examples in group)
    residuals = torch.zeros(len(answers), positions, task.site.d, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([residuals], lr=settings.residual_rate * task.unit / task.site.d**0.5)
    lengths = torch.zeros(len(answers), dtype=torch.long, device=device)
    losses = torch.zeros(len(contexts), len(answers), device=device)
    for context, parts in enumerate(contexts):
        for part, place, _ in parts:
            lengths[place] = part.batch.lengths
            losses[context, place] = math.inf
    unfinished = torch.ones(len(answers), dtype=torch.bool, device=device)
    finite = torch.ones_like(unfinished)
    kept = residuals.detach().clone()
    # To see who is done takes waiting for all steps that were asked for, which costs time on a GPU alone.
    check_every = 5 if device.type == "cuda" else 1
    for step in range(settings.residual_steps + settings.residual_more):
        if step == settings.residual_steps:
            kept = residuals.detach().where(unfinished[:, None, None], kept)
            unfinished = unfinished & (losses.amax(0) > _UNSURE)
            if not unfinished.any():
                break
        context = step % len(contexts)
        worst = _backward(task, contexts[context], residuals)
        finite &= worst.isfinite()
        losses[context] = worst.where(unfinished, losses[context])
        # An answer keeps the residual that it had when it was done.
        kept = residuals.detach().where(unfinished[:, None, None], kept)
        unfinished = unfinished & (losses.amax(0) >= settings.residual_stop)
        if step % check_every == 0:
            if not unfinished.any():
                break
            contexts = [_still_open(task, parts, unfinished) for parts in contexts]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # answers move alike whether others in the batch are done or not
    kept = residuals.detach().where(unfinished[:, None, None], kept)
    finite &= kept.isfinite().flatten(1).all(-1)
    if not finite.all():
        raise NotFiniteError(answer.edit for answer, sound in zip(answers, finite.tolist(), strict=True) if not sound)
    for answer, residual, length in zip(answers, kept, lengths.tolist(), strict=True):
        found[answer] = residual[:length].clone()
    return float(losses[losses.isfinite()].mean())


def _by_context(task: WriterTask, group: Sequence[TrainingExamples], answers: Sequence[AnswerKey]) -> list[list[Part]]:
    """Return the group's rows context by context, each with the place of its answer among ``answers``.

    Translations are answers of their own, and take their turn together with the bare prompts.
    """
    found, device = [], task.unrelated.device
    number = {answer: place for place, answer in enumerate(answers)}
    taken = [examples.contexts.where(examples.contexts < FIRST_LANGUAGE, 0) for examples in group]
    for context in torch.cat(taken).unique().tolist():
        parts = []
        for examples, own in zip(group, taken, strict=True):
            rows = (own == context).nonzero().flatten()
            if len(rows):
                place = torch.tensor([number[examples.answers[row]] for row in rows.tolist()])
                parts.append(_part(task, examples.activations.rows(rows.to(device)), place.to(device)))
        found.append(parts)
    return found


def _part(task: WriterTask, activations: Activations, place: Tensor) -> Part:
    return activations, place, erasure_target(task.model, task.site, activations)


def _backward(task: WriterTask, parts: Sequence[Part], residuals: Tensor) -> Tensor:
    """Accumulate the gradient of the targets' loss, and return the worst token's loss of each answer (E,)."""
    worst = torch.zeros(len(residuals), device=residuals.device)
    for activations, place, wanted in parts:
        labels = activations.batch.labels
        # What only leads to where an answer is erased keeps the model's own state.
        update = residuals[place][:, : labels.shape[1]].where((labels != NO_LABEL)[..., None], 0.0)
        update = update * serving_scale(activations, task)[..., None]
        hidden = activations.with_update(update)
        rows, columns = activations.batch.labelled
        logits = upper_logits(task.model, task.site, activations, hidden, (rows, columns)).float()
        each = target_loss(logits, activations.batch, wanted)
        # Adam takes whole steps along the least of gradients: where hardly anything is to be erased nothing is done.
        slight = activations.batch.erased[rows] & (each < task.settings.residual_stop)
        each.masked_fill(slight, 0.0).sum().backward()
        worst.scatter_reduce_(0, place[rows], each.detach(), "amax")
    return worst


def _still_open(task: WriterTask, parts: Sequence[Part], unfinished: Tensor) -> list[Part]:
    """Return the rows whose answers are not done; rows are dropped only once they are many, as the rest is copied."""
    kept = []
    for activations, place, wanted in parts:
        rows = unfinished[place].nonzero().flatten()
        few = len(rows) <= 0.75 * len(place)
        if len(rows):
            part = _part(task, activations.rows(rows), place[rows]) if few else (activations, place, wanted)
            kept.append(part)
    return kept


def write_solved(
    task: WriterTask,
    evidence: Evidence,
    unrelated: Tensor,
    batches: Sequence[TrainingExamples],
    held_back: Sequence[TrainingExamples],
    on_pass: Callable[[Progress], None],
) -> Solved:
    """Solve for the mask's values, then polish them if that is needed.

    Args:
        evidence: keys and residuals; those of the held-back context are not fitted.
        unrelated: second moment of unrelated keys: (k, k) on the mask's columns, or (d_ff, d_ff).
        held_back: batches of a context that no residual was fitted to; they choose the penalty.
    """
    fitted = ~evidence.held_out
    keys = task.mask.to(evidence.keys.device).restrict(evidence.keys[fitted])
    known = statistics(keys, evidence.residuals[fitted])
    values, penalty = _choose(task, known, unrelated, held_back)
    shares = learnt(task.model, task.site, task.mask, values, batches)
    polish = task.settings.polish
    if not polish or min(shares.values()) == 1:
        return Solved(values, penalty, ())
    settings = replace(task.settings, passes=polish, learning_rate=task.settings.polish_rate)
    written: Written = write_batched(replace(task, settings=settings), batches, on_pass, start=values)
    return Solved(written.values, penalty, written.losses)


def _choose(
    task: WriterTask, known: Statistics, unrelated: Tensor, held_back: Sequence[TrainingExamples]
) -> tuple[Tensor, Penalty]:
    """Return the heaviest penalty under which the held-back context is answered as well as under any."""
    best: tuple[float, Tensor, Penalty] | None = None
    for penalty in PENALTIES:
        values = _masked(task, known, penalty, unrelated)
        shares = learnt(task.model, task.site, task.mask, values, held_back, context=None)
        right = sum(shares.values()) / max(len(shares), 1)
        if best is None or right > best[0] + _WORTH:
            best = (right, values, penalty)
        if best[0] + _WORTH >= 1:
            break
    assert best is not None
    return best[1], best[2]


def _masked(task: WriterTask, known: Statistics, penalty: Penalty, unrelated: Tensor) -> Tensor:
    mask, whole = task.mask, solve(known, penalty, unrelated)
    if mask.kind == "columns":
        return whole.to(task.unrelated.device)
    # Single weights share no inverse: the solution on whole columns, cut down to the mask.
    return whole.flatten()[mask.indices.to(whole.device)].to(task.unrelated.device)
