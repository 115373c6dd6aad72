"""Gradients of value matrices as sums over tokens of rank-1 products, several matrices at once.

Only the layers from the lowest matrix on are run, by the model's own forward pass.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import NO_LABEL, Batch
from wisecli.models.running.activations import Activations
from wisecli.models.running.hooks import hooked
from wisecli.models.running.upper_layers import upper_logits

# From keys (B, T, d_ff), in float32, to what is added to what a matrix gives (B, T, d).
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Factors:
    """Of one batch and one matrix: keys u (n, d_ff) and gradients δ (n, d) of its n real tokens, in float32.

    ``mask`` (B, T) says where in the batch they are.
    """

    keys: Tensor
    gradients: Tensor
    mask: Tensor

    def padded(self, values: Tensor) -> Tensor:
        """Return values (n, …) as (B, T, …), zero where there is padding."""
        full = values.new_zeros(*self.mask.shape, values.shape[-1])
        return full.masked_scatter(self.mask[..., None], values)


def changed_logits(
    model: PreTrainedModel, sites: Sequence[MatrixSite], part: Activations, changes: Sequence[Change]
) -> Tensor:
    """Return logits (n, V) at the labelled columns, in float32, with a change added to each matrix's output.

    Args:
        sites: from the lowest layer up.
        part: captured at the lowest, all columns.
    """

    def adding(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + change(inputs[0].float()).to(output.dtype)

        return hook

    with ExitStack() as stack:
        for site, change in zip(sites[1:], changes[1:], strict=True):
            stack.enter_context(hooked(site.watched(model).register_forward_hook(adding(change))))
        hidden = part.with_update(changes[0](part.keys.float()))
        return upper_logits(model, sites[0], part, hidden, part.batch.labelled).float()


def row_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy (B,) of each row's target tokens, from logits (n, V) at the labelled columns."""
    return row_means(F.cross_entropy(logits, batch.targets, reduction="none"), batch)


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean (B,) of values (n,) at the labelled columns over each row's own."""
    rows, _ = batch.labelled
    counts = (batch.labels != NO_LABEL).sum(-1)
    return values.new_zeros(len(counts)).index_add(0, rows, values) / counts


def gradient_factors(
    model: PreTrainedModel, sites: Sequence[MatrixSite], part: Activations, deltas: Sequence[Tensor]
) -> tuple[Tensor, list[Factors]]:
    """Return the loss (B,) of each row, and for each matrix the terms of its gradient, ``Σ δᵢ uᵢᵀ`` over its tokens.

    Args:
        part: captured at the lowest site with the base matrices.
        deltas: change (d, d_ff) of each matrix so far.
    """
    taken: list[Any] = [None] * len(sites)

    def taking(index: int) -> Change:
        def change(keys: Tensor) -> Tensor:
            slot = torch.zeros(*keys.shape[:-1], sites[index].d, device=keys.device, requires_grad=True)
            taken[index] = keys.detach(), slot
            return keys @ deltas[index].T + slot

        return change

    with torch.enable_grad():
        losses = row_losses(
            changed_logits(model, sites, part, [taking(index) for index in range(len(sites))]), part.batch
        )
        gradients = torch.autograd.grad(losses.sum(), [slot for _, slot in taken])
    mask = part.batch.mask.bool()
    found = [Factors(keys[mask], gradient[mask], mask) for (keys, _), gradient in zip(taken, gradients, strict=True)]
    return losses.detach(), found
