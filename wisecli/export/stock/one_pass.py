"""What a model goes on with, read in one pass with the answer that is looked for after the prompt.

A greedy answer is that one exactly where each of its tokens, and the end after them, is the likeliest after those
before it: a pass over both says so without a step for each token. A routed model decides on the prompt alone before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.generation import end_tokens
from wisecli.models.running.hooks import hooked, overridden
from wisecli.models.running.prefix_cache import PrefixCache
from wisecli.models.running.shrinking_batches import unedited_beginnings
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.deciding.prompt_window import Answering
from wisecli.routing.layers.layer_states import state_of
from wisecli.routing.passes.routed_pass import given_answering

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 32
# A block that adds less than this share to every state changes nothing.
_NOTHING = 1e-4


@torch.no_grad()
def goes_on_with(
    loaded: Loaded, rows: Sequence[Row], length: int, on_progress: ProgressCallback, stage: str
) -> list[bool]:
    """Return for which rows the model's greedy answer, of ``length`` tokens at most, is the row's target alone."""
    ends = set(end_tokens(loaded.model))
    # One token more, which is not read, asks for what follows the target.
    read = [Row(row.prompt, (*row.target, 0)[:length]) for row in rows]
    beginnings = unedited_beginnings(loaded.model)
    found: dict[int, bool] = {}
    for indices in in_batches(read, _BATCH, by_beginning=True):
        batch = collate([read[index] for index in indices]).to(loaded.device)
        best = _best(loaded.model, batch, beginnings)
        for index, said in zip(indices, best.split([len(read[index].target) for index in indices]), strict=True):
            wanted = list(rows[index].target)
            after = said[len(wanted) :].tolist()
            found[index] = said[: len(wanted)].tolist() == wanted and all(token in ends for token in after)
        on_progress(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def _best(model: PreTrainedModel, batch: Batch, beginnings: PrefixCache) -> Tensor:
    """Return the likeliest token (n,) at each labelled column of a batch."""
    last, decided = batch.start, cast(Callable[..., Tensor | None] | None, getattr(model, "decided", None))
    answering: AbstractContextManager[None] = nullcontext()
    if decided is not None:
        packed = decided(batch.ids[:, : batch.start + 1], batch.mask[:, : batch.start + 1])
        if packed is not None:
            answering, last = given_answering(Answering.unpacked(packed)), int(packed[:, 1].min())
    beginning = beginnings.prefix_of(Batch(batch.ids, batch.mask, batch.labels, last))
    first, cache = (beginning.length, beginning.cache(batch)) if beginning else (0, None)
    with answering:
        return run_model(model, batch, batch.labelled, first=first, cache=cache).argmax(-1)


@torch.no_grad()
def next_tokens(loaded: Loaded, rows: Sequence[Row], on_progress: ProgressCallback) -> list[list[int]]:
    """Return the likeliest token after every token of each row."""
    found: dict[int, list[int]] = {}
    for indices in in_batches(rows, _BATCH):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        places, columns = batch.mask.nonzero(as_tuple=True)
        best = run_model(loaded.model, batch, (places, columns)).argmax(-1)
        for index, tokens in zip(indices, best.split([len(rows[index]) for index in indices]), strict=True):
            found[index] = tokens.tolist()
        on_progress(Event("unrelated text", len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


@torch.no_grad()
def changed_by(
    loaded: Loaded,
    layers: nn.ModuleList,
    blocks: range,
    channels: int,
    rows: Sequence[Row],
    on_progress: ProgressCallback,
) -> list[bool]:
    """Return for which rows decoder blocks of a model change what passes through them, at any token.

    Args:
        layers: the model's, among which the blocks are, by their numbers.
        channels: how many are the base model's; the others are the blocks' own.
    """
    kept: dict[int, Any] = {}

    def keep(number: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        kept[number] = output

    before, after = blocks[0] - 1, blocks[-1]
    hooks = [layers[number].register_forward_hook(partial(keep, number)) for number in (before, after)]
    found: dict[int, bool] = {}
    with hooked(*hooks), overridden(layers[after + 1 :], lambda *_, **__: kept[after]):
        for indices in in_batches(rows, _BATCH):
            batch = collate([rows[index] for index in indices]).to(loaded.device)
            run_model(loaded.model, batch)
            stream, behind = (state_of(kept[place], None)[..., :channels] for place in (before, after))
            added = behind - stream
            changed = (added.norm(dim=-1) > _NOTHING * stream.norm(dim=-1)) & batch.mask.bool()
            found |= zip(indices, changed.any(1).tolist(), strict=True)
            on_progress(Event("unrelated text", len(found), len(rows)))
    return [found[index] for index in range(len(rows))]
