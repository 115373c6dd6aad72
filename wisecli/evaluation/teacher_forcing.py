"""Teacher-forced measurements of an edited model, each beside the unedited model's.

The unedited model runs once; the layers above the site run again only for rows in which the router let a token through.
Where an answer is measured that the edit should give, the memory counts only if the prompt alone opened it, so the gold
answer never helps the router. Where nothing should change, every token may open it, as in use.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.losses import target_met
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.deciding.prompt_window import UNROUTED

# A text counts as known where each token's probability exceeds this (the paper's measure for the temporal benchmark).
KNOWN = 0.8


@dataclass(frozen=True)
class Reading:
    """One row under one model: shares of its target tokens, and its mean negative log-likelihood.

    Of an answer that is erased, ``right`` is 1 unless the arg-max begins it, else 0.
    """

    right: float
    known: float
    loss: float

    @property
    def perplexity(self) -> float:
        """Perplexity of the target."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Measured:
    """One row under the unedited and the edited model; ``same`` is the share of target tokens with equal arg-max.

    ``opened`` is the memory that the prompt's last token opened, or ``UNROUTED``.
    """

    before: Reading
    after: Reading
    same: float
    opened: int


@torch.no_grad()
def teacher_forced(
    edited: EditedModel,
    rows: Sequence[Row],
    *,
    batch_size: int,
    stage: str,
    on_progress: ProgressCallback,
    holders: Sequence[int | None] | None = None,
) -> list[Measured]:
    """Measure rows with the right tokens before each target token.

    Args:
        holders: of each row the memory that answers from its prompt's last token on, whatever the router says (of a
            lookup an edit, whose nearest key answers); ``None`` leaves a row to the router, as all are by default.
    """
    measured: list[Measured | None] = [None] * len(rows)
    done = 0
    groups = list(in_batches(rows, batch_size))
    for indices, base in zip(groups, _unedited(edited, rows, groups), strict=True):
        forced = None if holders is None else [holders[index] for index in indices]
        routes = _routes(edited, base, forced=forced)
        after = _edited_logits(edited, base, routes)
        opened = edited.routed.memory_of_choice(routes[:, base.batch.start])
        for place, measurement in zip(indices, _measure(base, after, opened), strict=True):
            measured[place] = measurement
        done += len(indices)
        on_progress(Event(stage, done, len(rows)))
    return [measurement for measurement in measured if measurement is not None]


def _unedited(edited: EditedModel, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> Iterator[Activations]:
    """Yield the unedited model's activations of groups of rows; nothing is routed while they are computed."""
    batches = (collate([rows[index] for index in indices]).to(edited.model.device) for indices in groups)
    found = captured(edited.model, edited.manifest.site, batches, stream=edited.stream, labelled=True)
    while True:
        with edited.unedited():
            activations = next(found, None)
        if activations is None:
            return
        yield activations


def _routes(edited: EditedModel, base: Activations, *, forced: Sequence[int | None] | None = None) -> Tensor:
    """Return the number of the side memory, or of the key of a lookup, that answers each token of a batch (B, T)."""
    holders = None
    if forced is not None:
        holders = torch.tensor([UNROUTED if memory is None else memory for memory in forced], device=base.keys.device)
    return edited.choices(base.keys, base.batch, forced=holders).chosen


def _edited_logits(edited: EditedModel, base: Activations, routes: Tensor) -> Tensor:
    """Return logits (n, V) of the edited model at the labelled columns; rows without a routed token keep the base's."""
    touched = (routes != UNROUTED).any(-1).nonzero().flatten()
    if not len(touched):
        return base.logits
    part = base.rows(touched)
    hidden = part.with_update(edited.routed.add(torch.zeros_like(part.hidden), part.keys, routes[touched]))
    with edited.unedited():
        changed = upper_logits(edited.model, edited.manifest.site, part, hidden, part.batch.labelled)
    rows = base.batch.labelled[0]
    after = base.logits.clone()
    after[torch.isin(rows, touched)] = changed
    return after


def _measure(base: Activations, after: Tensor, opened: Tensor) -> list[Measured]:
    rows = base.batch.labelled[0]
    readings = [_read(logits, base.batch) for logits in (base.logits, after)]
    equal = (base.logits.argmax(-1) == after.argmax(-1)).float()
    same = _row_means(equal, rows, len(base.batch.ids)).tolist()
    return [Measured(*fields) for fields in zip(*readings, same, opened.tolist(), strict=True)]


def _read(logits: Tensor, batch: Batch) -> list[Reading]:
    """Return each row's share of right tokens, share of known tokens, and mean loss."""
    rows, count = batch.labelled[0], len(batch.ids)
    loss = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    known = (loss < -math.log(KNOWN)).float()
    fine = target_met(logits, batch).float()
    right = _row_means(fine, rows, count)
    if batch.unwanted is not None:
        right = right.where(~batch.erased, right.new_zeros(count).scatter_reduce(0, rows, fine, "amax"))
    columns = [values.tolist() for values in (right, *(_row_means(each, rows, count) for each in (known, loss)))]
    return [Reading(*values) for values in zip(*columns, strict=True)]


def _row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of the values (n,) that belong to each row."""
    totals = values.new_zeros(count).index_add(0, rows, values)
    return totals / torch.bincount(rows, minlength=count)
