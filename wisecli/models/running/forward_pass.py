"""One pass of a model over some of the columns of a batch."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from wisecli.models.prompts.tokenization import Batch
from wisecli.models.running.hooks import hooked
from wisecli.routing.layers.module_types import accepted_arguments

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

# What models and their `generate()` call an attention cache: `past_key_values` before transformers 5.24.
CACHE_ARGUMENT = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

# Rows and columns.
Selection = tuple[Tensor, Tensor]


def run_model(
    model: PreTrainedModel,
    batch: Batch,
    select: Selection | None = None,
    *,
    first: int = 0,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Run a model over the columns of a batch from ``first`` on; return logits (n, V) at the selected ones.

    Args:
        select: rows and columns of the batch, to which alone the head is applied; none by default.
        cache: holds the columns before ``first``.
    """
    empty = torch.empty(0, dtype=torch.long, device=batch.ids.device)
    rows, columns = select or (empty, empty)

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][rows, columns - first].unsqueeze(0),)

    with hooked(model.get_output_embeddings().register_forward_pre_hook(pick)):
        named = {
            "input_ids": batch.ids[:, first:],
            "attention_mask": batch.mask,
            "position_ids": batch.positions[:, first:],
            "use_cache": cache is not None,
            CACHE_ARGUMENT: cache,
        }
        output = model(**accepted_arguments(type(model), named))
    logits: Tensor = output.logits[0]
    return logits


def fill_cache(model: PreTrainedModel, batch: Batch, cache: DynamicCache) -> tuple[Tensor, ...]:
    """Read a batch's tokens into an empty cache, and return nothing else of them."""
    run_model(model, batch, cache=cache)
    return ()
