"""The loss of rows: of their target's tokens, or of an erased answer of anything but that.

    L = - log p(t)              at a token t of a target
    L = KL(q ‖ p)               where a token should not be said

``q`` is the unedited model's own distribution, without the unwanted tokens: ``q(t) ∝ p_base(t)`` for all others. As
``q`` is zero there, ``L`` is at least ``- log(1 - p(unwanted))``: a small loss leaves unwanted tokens a small share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.models.layout.site import Site
from wisecli.models.prompts.tokenization import NO_LABEL, Batch
from wisecli.models.running.activations import Activations
from wisecli.models.running.upper_layers import upper_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def erasure_target(model: PreTrainedModel, site: Site, part: Activations) -> Tensor | None:
    """Return the distributions q (r, V) at the labelled columns of erased rows; ``None`` if no row is erased."""
    if part.batch.unwanted is None:
        return None
    rows, columns = part.batch.labelled
    erased = part.batch.labelled_erased
    logits = upper_logits(model, site, part, part.hidden, (rows[erased], columns[erased])).float()
    return logits.masked_fill(_unwanted(part.batch, logits), -torch.inf).softmax(-1)


def target_loss(logits: Tensor, batch: Batch, wanted: Tensor | None) -> Tensor:
    """Return the loss (n,) at each labelled column, from logits (n, V) there and what :func:`erasure_target` gave."""
    # In float32 at least; a model in float64 keeps what that is for.
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = F.cross_entropy(precise, batch.targets, reduction="none")
    if wanted is None:
        return found
    erased = batch.labelled_erased
    divergence = F.kl_div(logits[erased].float().log_softmax(-1), wanted, reduction="none").sum(-1)
    return found.index_copy(0, erased, divergence)


def target_met(logits: Tensor, batch: Batch) -> Tensor:
    """Return at which labelled columns (n,) the arg-max of logits (n, V) is right: the target, or no unwanted token."""
    best = logits.argmax(-1)
    right = best == batch.targets
    if batch.unwanted is None:
        return right
    rows, columns = batch.labelled
    unwanted = (batch.unwanted[rows, columns - batch.start] == best[:, None]).any(-1)
    return torch.where(batch.erased[rows], ~unwanted, right)


def _unwanted(batch: Batch, logits: Tensor) -> Tensor:
    """Return which tokens (r, V) are unwanted at the labelled columns of erased rows."""
    assert batch.unwanted is not None
    rows, columns = (index[batch.labelled_erased] for index in batch.labelled)
    tokens = batch.unwanted[rows, columns - batch.start]
    count = logits.shape[-1]
    # What only fills up is marked in a column of its own, and cut off.
    marked = torch.zeros(len(logits), count + 1, dtype=torch.bool, device=logits.device)
    return marked.scatter(1, tokens.where(tokens != NO_LABEL, count), True)[:, :count]
