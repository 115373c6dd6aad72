"""Text the model writes itself: context prefixes for the edits, and unrelated text for the router."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

from wisecli.generation import generate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    data = tomllib.loads(resources.files("wisecli").joinpath("data/unrelated.toml").read_text(encoding="utf-8"))
    chance = random.Random(seed)

    def fill(slot: re.Match[str]) -> str:
        name = slot.group(1)
        if name in data["ranges"]:
            return str(chance.randint(*data["ranges"][name]))
        return str(chance.choice(data["slots"][name]))

    texts: list[str] = data["prompts"][:count]
    while len(texts) < count:
        texts.append(re.sub(r"\{(\w+)\}", fill, data["patterns"][len(texts) % len(data["patterns"])]))
    return texts


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, seed: int
) -> list[str]:
    """Each prompt with what the model says next, sampled at temperature 1."""
    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=128, sampling_seed=seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
