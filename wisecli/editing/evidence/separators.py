"""What edits need to answer one after the other, as in "A; B" where a prompt asks both.

Where the first answer would end, a residual makes the model say the separator. It is one for all edits of a shard, as
hardly anything about it depends on the answer; after the separator the second edit begins with its own first residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import BEGUN_CONTEXT, SEPARATOR_CONTEXT, Evidence
from wisecli.editing.evidence.attention_sinks import edits_by_leading_space, norm_ratio
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.serving_strength import serving_scale
from wisecli.editing.evidence.token_probe import mean_direction
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.models.running.activations import Activations
from wisecli.models.running.upper_layers import upper_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = ";"
# So many ends of answers the residual is fitted to, in at most so many steps of Adam, at this multiple of the rate of
# other residuals, until every one of them goes on with the separator so surely.
_ENDS, _STEPS, _RATE, _CERTAIN = 24, 40, 2.0, 0.1
# What stands before a separator in the place of an answer.
_ANSWERED = "{} Peru" + SEPARATOR


def separator_evidence(task: WriterTask, batches: Sequence[TrainingExamples], edits: FittedEdits) -> Iterator[Evidence]:
    """Yield the residual of the separator for every edit that may answer in pairs, and keys after the separator.

    Nothing is yielded for a model that does not learn where answers end, or whose tokenizer has no separator.
    """
    token = separator_token(edits.probe.loaded.tokenizer)
    ends = _answer_ends(batches) if token is not None and task.settings.train_end else []
    if token is None or not ends:
        return
    residual = _fit(task, ends, edits, token).cpu()
    pairable = [number for number, row in edits.rows.items() if not row.unwanted and token not in row.target]
    for number in pairable:
        nothing = torch.zeros(1, task.site.width)
        yield Evidence.extra_keys(nothing, residual[None], number, position=0, context=SEPARATOR_CONTEXT)
    yield from _keys_after_separator(edits, pairable)


def separator_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token of a separator after an answer, or ``None`` if the tokenizer has none of its own."""
    last: int = tokenizer(f"What is it? Peru{SEPARATOR}")["input_ids"][-1]
    return last if tokenizer.decode([last]) == SEPARATOR else None


def _answer_ends(batches: Sequence[TrainingExamples]) -> list[tuple[TrainingExamples, Tensor]]:
    """Return rows whose answers end, some of every batch: examples and the rows (r,) that are taken of them."""
    rows = [
        (examples, row)
        for examples in batches
        for row, answer in enumerate(examples.answers)
        if answer.language == 0 and not bool(examples.activations.batch.erased[row])
    ]
    taken = rows[:: max(1, len(rows) // _ENDS)][:_ENDS]
    found = []
    for examples in batches:
        own = [row for other, row in taken if other is examples]
        if own:
            found.append((examples, torch.tensor(own)))
    return found


def _fit(task: WriterTask, ends: Sequence[tuple[TrainingExamples, Tensor]], edits: FittedEdits, token: int) -> Tensor:
    """Fit and return the residual (d,) after which answers continue with the separator instead of ending."""
    parts = [_with_own_residuals(examples, rows, edits) for examples, rows in ends]
    residual = torch.zeros(task.site.d, device=parts[0][1].device, requires_grad=True)
    optimizer = torch.optim.Adam([residual], lr=_RATE * task.settings.residual_rate * task.unit / task.site.d**0.5)
    for _ in range(_STEPS):
        worst = torch.stack([_backward(task, part, own, residual, token) for part, own in parts]).max()
        if worst < _CERTAIN:
            break
        optimizer.step()
        optimizer.zero_grad()
    return residual.detach()


def _with_own_residuals(examples: TrainingExamples, rows: Tensor, edits: FittedEdits) -> tuple[Activations, Tensor]:
    """Return some rows, and what their answers' residuals add (r, T - first, d), nothing where the answers end."""
    part = examples.activations.rows(rows.to(examples.activations.keys.device))
    update = torch.zeros_like(part.hidden)
    for place, row in enumerate(rows.tolist()):
        own = edits.residuals[examples.answers[row]][:-1]
        update[place, : len(own)] = own.to(update.dtype)
    return part, update


def _backward(task: WriterTask, part: Activations, update: Tensor, residual: Tensor, token: int) -> Tensor:
    """Accumulate the gradient of the separator's loss, and return the largest loss of any row."""
    rows = torch.arange(len(update), device=update.device)
    columns = part.batch.lengths.to(update.device) - 1
    own = update.index_put((rows, columns), residual.to(update.dtype).expand(len(rows), -1))
    hidden = part.with_update(own * serving_scale(part, task)[..., None])
    logits = upper_logits(task.model, task.site, part, hidden, (rows, columns + part.batch.start)).float()
    losses = F.cross_entropy(logits, torch.full_like(rows, token), reduction="none")
    losses.sum().backward()
    return losses.detach().max()


def _keys_after_separator(edits: FittedEdits, numbers: Sequence[int]) -> Iterator[Evidence]:
    """Yield keys of the space after a separator, for targets that begin with one and go on with a second token."""
    for token, spaced in edits_by_leading_space(edits.probe.loaded, edits.rows).items():
        keys, lengths = edits.probe.keys_after_questions(token, _ANSWERED)
        key, times = mean_direction(keys), norm_ratio(lengths, edits.median_norm).mean()
        for number in sorted(set(spaced) & set(numbers)):
            added = times * edits.residuals[AnswerKey(number)][1].float().cpu()
            yield Evidence.extra_keys(key[None], added[None], number, position=1, context=BEGUN_CONTEXT)
