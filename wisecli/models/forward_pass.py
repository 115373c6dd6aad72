"""One pass of a model over some of the columns of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wisecli.models.hooks import hooked
from wisecli.models.tokenization import Batch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

# Rows and columns.
Selection = tuple[Tensor, Tensor]


def run_model(
    model: PreTrainedModel, batch: Batch, first: int, cache: DynamicCache | None, select: Selection | None
) -> Tensor:
    """The model's forward pass over the columns from ``first`` on; its head sees the selected columns only."""
    empty = torch.empty(0, dtype=torch.long, device=batch.ids.device)
    rows, columns = select or (empty, empty)

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][rows, columns].unsqueeze(0),)

    with hooked(model.get_output_embeddings().register_forward_pre_hook(pick)):
        output = model(
            input_ids=batch.ids[:, first:],
            attention_mask=batch.mask,
            position_ids=batch.positions[:, first:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    logits: Tensor = output.logits[0]
    return logits
