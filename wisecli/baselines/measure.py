"""Teacher-forced and generated answers of a method's model, read as a whole: nothing is known of how it was edited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.baselines.protocol import Method
from wisecli.encode import Row, collate, in_batches
from wisecli.events import Event, Watcher, ignore
from wisecli.generation import generate
from wisecli.hooks import hooked
from wisecli.models import Loaded


@dataclass(frozen=True)
class Said:
    """What a model says at the target tokens of one row: its arg-max (n,), and the loss of each target token (n,)."""

    best: Tensor
    losses: Tensor


@torch.no_grad()
def said(
    loaded: Loaded,
    rows: Sequence[Row],
    method: Method | None = None,
    *,
    batch_size: int,
    stage: str = "measuring",
    watch: Watcher = ignore,
) -> list[Said]:
    """What the model says given the right tokens before each target token; as edited, if a ``method`` is given."""
    found: dict[int, Said] = {}
    for indices in in_batches(rows, batch_size):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        at, columns = batch.labelled

        def pick(_module: object, inputs: tuple[Tensor, ...], at: Tensor = at, columns: Tensor = columns) -> Tensor:
            return inputs[0][at, columns].unsqueeze(0)

        head = loaded.model.get_output_embeddings().register_forward_pre_hook(pick)
        with nullcontext() if method is None else method.applied(batch.start), hooked(head):
            logits = loaded.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
            ).logits[0]
        labels = batch.labels[at, columns - batch.start]
        losses = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
        best, at = logits.argmax(-1).cpu(), at.cpu()
        found |= {index: Said(best[at == row], losses[at == row]) for row, index in enumerate(indices)}
        watch(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def answers(
    loaded: Loaded, prompts: Sequence[str], method: Method | None = None, *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers, up to the end of text; as edited, if a ``method`` is given."""
    found: list[str] = []
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        with nullcontext() if method is None else method.applied():
            tokens = generate(
                loaded.model, loaded.tokenizer, some, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
        found += [text.strip() for text in loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return found
