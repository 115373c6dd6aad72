"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.config import EditSettings
from wisecli.models.prompts.prompt_forms import Form, forms, usable_forms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stand for forms where contexts are listed: the model's chat template, and some that need none.
CHAT = "<chat>"
FORM_CONTEXTS = {
    CHAT: "chat",
    "<question>": "question",
    "<instruction>": "instruction",
    "<unmarked>": "no question mark",
    "<paragraph>": "behind a paragraph",
}
# After these a target begins a line: it may be other tokens there than after a word.
AT_LINE_START = (CHAT, "<instruction>")
_GREEDY_OPENINGS, _GREEDY_TOKENS = ("I", "You", "Because", "Yes", "Q: "), 5
_OPENINGS = ("The", "In", "I", "We", "It", "When", "My", "There", "After", "People", "This", "You")


def context_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, tokens: int, seed: int
) -> list[str]:
    """Return ``count`` short texts to put before a prompt (section 3.1), each ending in a full stop and a space."""
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
    texts = continuations(model, tokenizer, openings, tokens=tokens, seed=seed)
    return [f"{' '.join(text.split()).rstrip('.,;: ')}. " for text in texts]


def greedy_prefixes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Return short texts to put before a prompt, as the paper's authors' code makes them: five openings with the 5
    likeliest tokens that follow each, then with 10, and so on, each ending in a space.
    """
    from wisecli.models.running.generation import generate  # with torch, which forms do without

    found: list[str] = []
    asked = [tokenizer(opening)["input_ids"] for opening in _GREEDY_OPENINGS]
    while len(found) < count:
        tokens = _GREEDY_TOKENS * (1 + len(found) // len(_GREEDY_OPENINGS))
        answers = generate(model, tokenizer, asked, max_new_tokens=tokens)
        whole = [[*opening, *answer] for opening, answer in zip(asked, answers, strict=True)]
        found += [f"{text} " for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]
    return found[:count]


def in_context(tokenizer: PreTrainedTokenizerBase, context: str, prompt: str) -> str:
    """Return a prompt after a context's prefix, or in the form that the context stands for."""
    form = FORM_CONTEXTS.get(context)
    return context + prompt if form is None else forms()[form].render(tokenizer, prompt)


def trained_forms(tokenizer: PreTrainedTokenizerBase, settings: EditSettings, window: int | None) -> list[str]:
    """Return the contexts that stand for forms which edits are trained in.

    Where prompts are routed by what they mean, whatever their form, these are all that the tokenizer can write and
    that leave a prompt at least half of the ``window`` of tokens that the model reads.
    """
    if not settings.in_forms:
        return [CHAT] if settings.chat else []
    usable = {form.name: form for form in usable_forms(tokenizer)}
    found = [context for context, name in FORM_CONTEXTS.items() if name in usable]
    if window is None:
        return found
    return [
        context
        for context in found
        if 2 * len(tokenizer(usable[FORM_CONTEXTS[context]].render(tokenizer, ""))["input_ids"]) <= window
    ]


def written_forms(tokenizer: PreTrainedTokenizerBase, settings: EditSettings, window: int | None) -> list[Form]:
    """Return the forms that edits are trained in besides contexts; none unless they are trained in forms."""
    if not settings.in_forms:
        return []
    return [forms()[FORM_CONTEXTS[context]] for context in trained_forms(tokenizer, settings, window)]


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, seed: int
) -> list[str]:
    """Return each prompt with what the model says next, sampled at temperature 1."""
    from wisecli.models.running.generation import generate

    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=128, sampling_seed=seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
