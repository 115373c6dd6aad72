"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.models.chat import chat_prompt
from wisecli.models.generation import generate

if sys.version_info >= (3, 11):
    pass
else:
    pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stands for the model's chat template where contexts are listed.
CHAT = "<chat>"
_OPENINGS = ("The", "In", "I", "We", "It", "When", "My", "There", "After", "People", "This", "You")


def context_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, tokens: int, seed: int
) -> list[str]:
    """Short texts to put before a prompt (section 3.1), ``count`` of them, each ending in a full stop and a space."""
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
    texts = continuations(model, tokenizer, openings, tokens=tokens, seed=seed)
    return [f"{' '.join(text.split()).rstrip('.,;: ')}. " for text in texts]


def in_context(tokenizer: PreTrainedTokenizerBase, context: str, prompt: str) -> str:
    """A prompt behind a context's prefix, or for the context ``CHAT`` in the model's chat template."""
    return chat_prompt(tokenizer, prompt) if context == CHAT else context + prompt


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, seed: int
) -> list[str]:
    """Each prompt with what the model says next, sampled at temperature 1."""
    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=128, sampling_seed=seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
