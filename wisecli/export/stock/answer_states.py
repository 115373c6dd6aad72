"""States that leave the edited layer while a model answers greedily: every token is read once, and none again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.export.stock.gate_states import normed
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.generation import end_tokens
from wisecli.models.running.hooks import hooked
from wisecli.models.running.prefix_cache import PrefixCache, empty_cache
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.layers.layer_states import state_of

if TYPE_CHECKING:
    from transformers import DynamicCache


@torch.no_grad()
def answer_states(
    loaded: Loaded,
    site: Site,
    texts: Sequence[str],
    *,
    length: int,
    whole: bool,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
) -> list[Tensor]:
    """Return the normed states (n, d) of each text's last token, or of all its tokens, and of its answer's.

    Args:
        length: how many tokens answers have at most; the one that ends an answer is none of them.
        whole: whether all of a text's tokens are wanted.
    """
    rows = [Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts]
    reader = _Reader(loaded, site, length)
    found: dict[int, Tensor] = {}
    for indices in in_batches(rows, batch_size, by_beginning=True):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        states, counts = reader.read(batch, whole=whole)
        for index, own, count in zip(indices, states, counts, strict=True):
            asked = len(rows[index].prompt) if whole else 1
            found[index] = own[states.shape[1] - length - asked : states.shape[1] - length + count].float().cpu()
        on_progress(Event(stage, len(found), len(rows)))
    epsilon = float(loaded.model.config.rms_norm_eps)
    return [normed(found[index], epsilon) for index in range(len(rows))]


class _Reader:
    """Reads batches of prompts and the model's answers to them, and what many prompts begin with once."""

    def __init__(self, loaded: Loaded, site: Site, length: int) -> None:
        self._model, self._site, self._length = loaded.model, site, length
        self._ends = torch.tensor(end_tokens(loaded.model), dtype=torch.long, device=loaded.device)
        self._beginnings = PrefixCache(self._beginning)

    def read(self, batch: Batch, *, whole: bool) -> tuple[Tensor, list[int]]:
        """Return states (B, T + length, d), or without those of all but the prompts' last tokens, and how many tokens
        each answer has.
        """
        beginning = self._beginnings.prefix_of(batch)
        cache = beginning.cache(batch) if beginning else empty_cache()
        states = list(beginning.before(batch)) if beginning and whole else []
        going_on = torch.ones(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
        counts = torch.zeros_like(batch.ids[:, 0])
        for step in range(self._length + 1):
            hidden, token = self._pass(batch, cache)
            states.append(hidden if whole else hidden[:, -1:])
            going_on = going_on & ~torch.isin(token, self._ends)
            if step < self._length:
                counts = counts + going_on
                batch = _longer(batch, token)
        return torch.cat(states, 1), counts.tolist()

    def _beginning(self, batch: Batch, cache: DynamicCache) -> tuple[Tensor, ...]:
        """States of what batches begin with; the cache is filled."""
        return (self._pass(batch, cache)[0],)

    def _pass(self, batch: Batch, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Return the states (B, T', d) of columns that the cache does not hold yet, and the token that follows (B,)."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(state_of(output, self._site.streams))

        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        layer = self._model.get_submodule(self._site.layer_module)
        with hooked(layer.register_forward_hook(keep)):
            columns = torch.full_like(rows, batch.ids.shape[1] - 1)
            first = cache.get_seq_length()
            logits = run_model(self._model, batch, first, cache, (rows, columns - first))
        return kept[0], logits.argmax(-1)


def _longer(batch: Batch, token: Tensor) -> Batch:
    """Return a batch with one more token (B,) at the end of every row."""
    ids = torch.cat([batch.ids, token[:, None]], 1)
    return Batch(ids, torch.cat([batch.mask, torch.ones_like(token[:, None])], 1), batch.labels, batch.start)
