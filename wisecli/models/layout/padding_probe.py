"""Finds out whether a model reads the rows of a padded batch otherwise than each alone: its positions count the
padding, or its states mix with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.forward_pass import run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def reads_rows_alike(model: PreTrainedModel) -> bool:
    """Return whether a short row beside a long one gives what it gives alone."""
    count = len(model.get_input_embeddings().get_parameter("weight"))
    rows = [Row(tuple(token % count for token in range(3, 3 + length)), (5 % count,)) for length in (9, 4)]
    both, alone = (collate(chosen).to(model.device) for chosen in (rows, rows[1:]))
    last = tuple(one[-1:] for one in both.labelled)
    found = run_model(model, both, 0, None, (last[0], last[1])).float()
    expected = run_model(model, alone, 0, None, alone.labelled).float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return float((found - expected).norm()) <= tolerance * float(expected.norm())
