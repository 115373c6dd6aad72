"""What a model goes on with, read in one pass with the answer that is looked for behind the prompt.

A greedy answer is that one exactly where each of its tokens, and the end behind them, is the likeliest after those
before it: a pass over both says so without a step for each token. This holds for models that decide nothing where a
prompt ends, as base models and checkpoints with a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.generation import end_tokens
from wisecli.models.running.prefix_cache import PrefixCache
from wisecli.progress import Event, ProgressCallback

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_BATCH = 32


@torch.no_grad()
def goes_on_with(
    loaded: Loaded, rows: Sequence[Row], length: int, on_progress: ProgressCallback, stage: str
) -> list[bool]:
    """Return for which rows the model's greedy answer, of ``length`` tokens at most, is the row's target alone."""
    ends = set(end_tokens(loaded.model))
    # One token more, which is not read, asks for what follows the target.
    read = [Row(row.prompt, (*row.target, 0)[:length]) for row in rows]
    beginnings = PrefixCache(partial(_read, loaded.model))
    found: dict[int, bool] = {}
    for indices in in_batches(read, _BATCH, by_beginning=True):
        batch = collate([read[index] for index in indices]).to(loaded.device)
        beginning = beginnings.prefix_of(batch)
        first, cache = (beginning.length, beginning.cache(batch)) if beginning else (0, None)
        best = run_model(loaded.model, batch, first, cache, batch.labelled).argmax(-1)
        for index, said in zip(indices, best.split([len(read[index].target) for index in indices]), strict=True):
            wanted = list(rows[index].target)
            after = said[len(wanted) :].tolist()
            found[index] = said[: len(wanted)].tolist() == wanted and all(token in ends for token in after)
        on_progress(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def _read(model: PreTrainedModel, batch: Batch, cache: DynamicCache) -> tuple[Tensor, ...]:
    """Fill a cache with what a batch's tokens leave in it."""
    run_model(model, batch, 0, cache, None)
    return ()


@torch.no_grad()
def next_tokens(loaded: Loaded, rows: Sequence[Row], on_progress: ProgressCallback) -> list[Tensor]:
    """Return the likeliest token (n,) after every token of each row."""
    found: dict[int, Tensor] = {}
    for indices in in_batches(rows, _BATCH):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        best = run_model(loaded.model, batch, 0, None, batch.mask.nonzero(as_tuple=True)).argmax(-1).cpu()
        found |= zip(indices, best.split([len(rows[index]) for index in indices]), strict=True)
        on_progress(Event("unrelated text", len(found), len(rows)))
    return [found[index] for index in range(len(rows))]
