"""Which edits the unedited model needs no editing for: it gives their targets already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.hooks import giving
from wisecli.models.streaming.layer_sweep import sweep
from wisecli.models.streaming.tensor_spill import Spool
from wisecli.progress import Event, ProgressCallback

if TYPE_CHECKING:
    from wisecli.models.streaming.layer_stream import LayerStream


@torch.no_grad()
def known_rows(
    loaded: Loaded, rows: Sequence[Row], *, batch_size: int, on_progress: ProgressCallback
) -> frozenset[int]:
    """Return the indices of rows whose target tokens are all the arg-max, with teacher forcing.

    Where layers are streamed, each is read once for all rows.
    """
    groups = list(in_batches(rows, batch_size))
    batches = [collate([rows[place] for place in places]).to(loaded.device) for places in groups]
    known: set[int] = set()
    done = 0
    for places, batch, logits in zip(groups, batches, _logits(loaded, batches), strict=True):
        missed = logits.argmax(-1) != batch.targets
        wrong = set(batch.labelled[0][missed].tolist())
        known |= {place for row, place in enumerate(places) if row not in wrong}
        done += len(places)
        on_progress(Event("known already", done, len(rows)))
    return frozenset(known)


def _logits(loaded: Loaded, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield logits (n, V) of every batch at its labelled columns."""
    if loaded.stream is not None:
        yield from _swept(loaded, loaded.stream, batches)
        return
    for batch in batches:
        yield run_model(loaded.model, batch, batch.labelled)


def _swept(loaded: Loaded, stream: LayerStream, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield each batch's logits, with every layer read once for all batches."""
    with Spool(stream.spool_bytes) as spool:
        passes = [partial(run_model, loaded.model, batch) for batch in batches]
        sweep(stream, passes, len(stream.layers) - 1, spool, lambda _number: None)
        for number, batch in enumerate(batches):
            hidden = spool.take(f"hidden.{number}")
            # What leaves the last layer only has to pass the final norm and the head.
            with giving(stream.layers, hidden, stream.width):
                logits = run_model(loaded.model, batch, batch.labelled)
            yield logits
