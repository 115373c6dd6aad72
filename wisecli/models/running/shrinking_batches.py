"""Answers to a batch of prompts, whose rows may leave it as they end.

Most answers are a few tokens long, and one in a batch is as long as it may be. On a CPU a step takes the longer the
more rows it has, so those that have ended are taken out: of the tokens, the mask, the attention cache, and of what
their prompts decided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wisecli.models.prompts.tokenization import Batch
from wisecli.models.running.forward_pass import CACHE_ARGUMENT, fill_cache
from wisecli.models.running.prefix_cache import PrefixCache
from wisecli.routing.layers.module_types import ANSWERING
from wisecli.routing.passes.routed_pass import Override, overridden_by
from wisecli.routing.passes.token_cache import cache_returned

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

# Where methods that decide once a row keep what they decided, on the cache.
ROW_DECISIONS = "held_rows"
# Rows are taken out when no more than this share of them goes on, since each time is a call of `generate()` more.
_GOING_ON = 0.75
# Whether an answer need not go on after some tokens.
Hopeless = Callable[[list[int]], bool]


class StopWhenFewContinue:
    """Stops a batch when only few of its rows continue, and knows which have ``ended`` (B,).

    Args:
        ends: tokens that end a row, on the model's device.
        rows: how many there are.
        hopeless: what ends each row besides, if anything does.
        width: how many tokens of a row are its prompt.
    """

    def __init__(self, ends: Tensor, rows: int, hopeless: Sequence[Hopeless | None] = (), width: int = 0) -> None:
        self.ends, self.enough, self.hopeless, self.width = ends, int(_GOING_ON * rows), hopeless, width
        self.ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, ids: Tensor, _scores: Any) -> Tensor:
        """Return whether to stop, which is the same for all rows: token ids (B, T) → (B,)."""
        self.ended = self.ended | torch.isin(ids[:, -1], self.ends)
        for row, vain in enumerate(self.hopeless):
            if vain is not None and not self.ended[row]:
                self.ended[row] = vain(ids[row, self.width :].tolist())
        return torch.full_like(self.ended, int((~self.ended).sum()) <= self.enough)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, and who answers them.

    Args:
        generate: a model's ``generate()``, with all settings but those here.
        ids, mask: (B, T).
        max_new_tokens: how long an answer may be, n.
        decided: what the prompts decided, (B, 2), of a model that an edit was put into.
        hopeless: of each row, or of none.
    """

    generate: Callable[..., Any]
    ids: Tensor
    mask: Tensor
    max_new_tokens: int
    decided: Tensor | None = None
    hopeless: Sequence[Hopeless | None] = ()

    def shared_prefix(self, beginnings: PrefixCache | None) -> DynamicCache | None:
        """Return an attention cache of what all rows begin with; ``None`` where it is not kept, or not worth the while.

        It ends before the first of the tokens that an edit answers, which are those from a prompt's last one on.
        """
        if beginnings is None:
            return None
        last = self.ids.shape[1] - 1 if self.decided is None else int(self.decided[:, 1].min())
        batch = Batch(self.ids, self.mask, self.ids[:, :0], last)
        prefix = beginnings.prefix_of(batch)
        return None if prefix is None else prefix.cache(batch)

    def answer(self) -> list[list[int]]:
        """Return the tokens generated for each row, padded where a row has ended: (B, n) or fewer."""
        output = self.generate(self.ids, attention_mask=self.mask, max_new_tokens=self.max_new_tokens)
        rows: list[list[int]] = output[:, self.ids.shape[1] :].tolist()
        return rows

    def answer_shrinking(self, ends: Collection[int], cache: DynamicCache | None = None) -> list[list[int]]:
        """Return what follows each row, with padding after some that ended.

        Args:
            ends: the tokens that end a row.
            cache: of the rows' first columns.
        """
        ids, mask, width = self.ids, self.mask, self.ids.shape[1]
        final = torch.tensor(list(ends), dtype=torch.long, device=ids.device)
        places, answers = torch.arange(len(ids), device=ids.device), [list[int]() for _ in ids]
        while len(places):
            vain = [self.hopeless[place] for place in places.tolist()] if self.hopeless else []
            few = StopWhenFewContinue(final, len(ids), vain, width)
            output = self.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=width + self.max_new_tokens - ids.shape[1],
                stopping_criteria=[few],
                return_dict_in_generate=True,
                **({} if cache is None else {CACHE_ARGUMENT: cache}),
                # What has been answered so far is no prompt.
                **({} if self.decided is None else {ANSWERING: self.decided[places]}),
            )
            cache = cache_returned(output)
            if cache is None or is_recurrent(cache):  # its rows cannot be taken up again in another call
                return self.answer()
            for row, answer in zip(places.tolist(), output.sequences[:, width:].tolist(), strict=True):
                answers[row] = answer
            if output.sequences.shape[1] == width + self.max_new_tokens:
                break
            left = (~few.ended).nonzero().flatten()
            keep_rows(cache, left)
            ids, places = output.sequences[left], places[left]
            mask = torch.cat([mask[left], mask.new_ones(len(left), ids.shape[1] - mask.shape[1])], 1)
        return answers


def unedited_beginnings(model: PreTrainedModel) -> PrefixCache:
    """Return a cache of what batches begin with, as the unedited model reads it."""

    def read(batch: Batch, cache: DynamicCache) -> tuple[Tensor, ...]:
        with overridden_by(Override(off=True)):
            return fill_cache(model, batch, cache)

    return PrefixCache(read)


def is_recurrent(cache: Any) -> bool:
    """Return whether a cache holds anything else than attention's keys and values."""
    from transformers import DynamicCache

    return type(cache) is not DynamicCache or any(hasattr(layer, "conv_states") for layer in cache.layers)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Leave in an attention cache some rows (n,) alone, and what a method holds of them."""
    cache.reorder_cache(rows)  # as beams do; `batch_select_indices` leaves recurrent states as they are
    decisions: Tensor | None = getattr(cache, ROW_DECISIONS, None)
    if decisions is not None:
        setattr(cache, ROW_DECISIONS, decisions[rows])
