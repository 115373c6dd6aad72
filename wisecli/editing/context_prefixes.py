"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.models.forms import forms, usable_forms
from wisecli.models.generation import generate

if sys.version_info >= (3, 11):
    pass
else:
    pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stand for forms where contexts are listed: the model's chat template, and some that need none.
CHAT = "<chat>"
_FORMS = {
    CHAT: "chat",
    "<question>": "question",
    "<instruction>": "instruction",
    "<unmarked>": "no question mark",
    "<paragraph>": "behind a paragraph",
}
# After these a target begins a line: it may be other tokens there than after a word.
AT_LINE_START = (CHAT, "<instruction>")
_OPENINGS = ("The", "In", "I", "We", "It", "When", "My", "There", "After", "People", "This", "You")


def context_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, tokens: int, seed: int
) -> list[str]:
    """Short texts to put before a prompt (section 3.1), ``count`` of them, each ending in a full stop and a space."""
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
    texts = continuations(model, tokenizer, openings, tokens=tokens, seed=seed)
    return [f"{' '.join(text.split()).rstrip('.,;: ')}. " for text in texts]


def in_context(tokenizer: PreTrainedTokenizerBase, context: str, prompt: str) -> str:
    """A prompt behind a context's prefix, or in the form that the context stands for."""
    return forms()[_FORMS[context]].asked(tokenizer, prompt) if context in _FORMS else context + prompt


def form_contexts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The contexts that stand for forms, as far as the tokenizer can write them."""
    usable = {form.name for form in usable_forms(tokenizer)}
    return [context for context, name in _FORMS.items() if name in usable]


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, seed: int
) -> list[str]:
    """Each prompt with what the model says next, sampled at temperature 1."""
    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=128, sampling_seed=seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
