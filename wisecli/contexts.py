"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.errors import ModelError
from wisecli.generation import generate

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


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the user's turn in the model's chat template, up to where the answer begins.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model's tokenizer has no chat template; leave out --chat")
    return _chat(tokenizer, [("user", prompt)])


def shown_how(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]], asked: str) -> str:
    """A request after examples of requests and replies, up to where the reply begins.

    In the model's chat template, or without one as paragraphs, two a turn.
    """
    if not tokenizer.chat_template:
        return "".join(f"{request}\n{reply}\n\n" for request, reply in examples) + f"{asked}\n"
    told = [(role, text) for pair in examples for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _chat(tokenizer, [*told, ("user", asked)])


def _chat(tokenizer: PreTrainedTokenizerBase, told: Sequence[tuple[str, str]]) -> str:
    """Turns of a chat, by role and text, and the opening of the next; the tokenizer adds the beginning of text."""
    turns = [{"role": role, "content": text} for role, text in told]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    opening = tokenizer.bos_token
    added = bool(opening) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(opening)) if added else text


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, seed: int
) -> list[str]:
    """Each prompt with what the model says next, sampled at temperature 1."""
    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=128, sampling_seed=seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
