"""What is like the keys inside an edit's answer and not its own: the same answer after other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.editing.context_prefixes import CHAT, in_context
from wisecli.editing.key_capture import window_keys
from wisecli.editing.prompt_variants import answers_of
from wisecli.edits.record import Edit
from wisecli.models.generation import end_token
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
from wisecli.models.tokenization import encode
from wisecli.routing.whitening import Whitening

# Prompts that no answer belongs to.
_UNANSWERED = ("The report says that it was called", "When was the old bridge built?")


@dataclass(frozen=True)
class HardNegatives:
    """For numbered edits keys (n, d_ff) that are like their own, and the whitening that both are seen through."""

    keys: dict[int, Tensor]
    white: Whitening


def hard_negative_keys(
    loaded: Loaded, site: Site, edits: Sequence[tuple[int, Edit]], *, batch_size: int, train_end: bool, chat: bool
) -> dict[int, Tensor]:
    """Keys (n, d_ff) inside each numbered edit's answers where they stand after prompts that they do not answer.

    What is erased is left out: it should not be said there either.
    """
    end = end_token(loaded.model) if train_end else None
    prompts = [
        in_context(loaded.tokenizer, way, text) for way in ("", *([CHAT] if chat else [])) for text in _UNANSWERED
    ]
    answers = answers_of(edits)
    rows = [encode(loaded.tokenizer, prompt, target, end=end) for prompt in prompts for _, target in answers]
    found: dict[int, list[Tensor]] = {number: [] for number, _ in answers}
    for place, keys in enumerate(window_keys(loaded, site, rows, batch_size=batch_size)):
        found[answers[place % len(answers)][0]].append(keys[1:].cpu())
    return {number: torch.cat(parts) for number, parts in found.items()}
