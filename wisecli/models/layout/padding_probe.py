"""Finds out whether a model reads the rows of a padded batch otherwise than each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.forward_pass import run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def reads_rows_alike(model: PreTrainedModel) -> bool:
    """Return whether a short row beside a long one gives what it gives alone."""
    rows = probe_rows(model, (5,))
    both, alone = (collate(chosen).to(model.device) for chosen in (rows, rows[1:]))
    last = tuple(index[-1:] for index in both.labelled)
    batched = run_model(model, both, (last[0], last[1]))
    return alike(model, batched, run_model(model, alone, alone.labelled))


def probe_rows(model: PreTrainedModel, target: Sequence[int]) -> list[Row]:
    """Return two rows of a prompt and a target, of unequal length."""
    count = vocabulary_rows(model)
    shared = tuple(token % count for token in target)
    return [Row(tuple(token % count for token in range(3, 3 + length)), shared) for length in (9, 4)]


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has a row for."""
    return len(model.get_input_embeddings().get_parameter("weight"))


def alike(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    """Return whether logits are the same, but for what the model's type rounds."""
    return float((found - expected).float().norm()) <= tolerance_of(model) * float(expected.float().norm())


def tolerance_of(model: PreTrainedModel) -> float:
    """Return the relative rounding error to accept in a model's outputs, by its type."""
    return 1e-3 if model.dtype == torch.float32 else 0.1
