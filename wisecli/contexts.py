"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from wisecli.errors import ModelError
from wisecli.generation import generate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stands for the model's chat template where contexts are listed.
CHAT = "<chat>"
# Facts of each relation that are asked in every wording there is, beside so many unrelated texts.
_SUBJECTS, _TEXTS = 8, 600
_SLOT = re.compile(r"\{(\w+)\}")
_OPENINGS = ("The", "In", "I", "We", "It", "When", "My", "There", "After", "People", "This", "You")


def context_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, tokens: int, seed: int
) -> list[str]:
    """Short texts to put before a prompt (section 3.1), ``count`` of them, each ending in a full stop and a space."""
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
    texts = continuations(model, tokenizer, openings, tokens=tokens, seed=seed)
    return [f"{' '.join(text.split()).rstrip('.,;: ')}. " for text in texts]


def unrelated_texts(count: int, *, seed: int) -> list[str]:
    """Texts on everyday matters that come with the package: all its prompts, then filled patterns, ``count`` in all."""
    data = _packaged("unrelated.toml")
    chance = random.Random(seed)
    texts: list[str] = data["prompts"][:count]
    while len(texts) < count:
        pattern = data["patterns"][len(texts) % len(data["patterns"])]
        texts.append(_SLOT.sub(lambda slot: _filled(slot.group(1), data, chance), pattern))
    return texts


def subjects_for(texts: int) -> int:
    """How many facts of each relation go with so many unrelated texts."""
    return max(1, min(_SUBJECTS, round(_SUBJECTS * texts / _TEXTS)))


def reworded_facts(subjects: int, *, seed: int) -> list[list[str]]:
    """Made-up facts, each asked in every way the package knows for its relation; ``subjects`` facts a relation."""
    data = _packaged("unrelated.toml")
    chance = random.Random(seed)
    facts = []
    for ways in _packaged("rewordings.toml")["facts"]:
        slot = _SLOT.findall(ways[0])[0]
        for subject in chance.sample(data["slots"][slot], subjects):
            facts.append([_SLOT.sub(subject, way) for way in ways])
    return facts


def _packaged(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("wisecli").joinpath("data", name).read_text(encoding="utf-8"))


def _filled(name: str, data: dict[str, Any], chance: random.Random) -> str:
    if name in data["ranges"]:
        return str(chance.randint(*data["ranges"][name]))
    return str(chance.choice(data["slots"][name]))


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
