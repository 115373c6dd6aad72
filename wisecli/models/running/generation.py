"""Text from a model, in batches padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from wisecli.errors import ModelError
from wisecli.io.json_schema import shown
from wisecli.models.prompts.tokenization import Row, in_batches
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.hooks import hooked
from wisecli.models.running.seeding import seeded
from wisecli.models.running.shrinking_batches import Hopeless, PromptBatch
from wisecli.models.text_input import context_window
from wisecli.routing.deciding.prompt_window import UNROUTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wisecli.models.running.prefix_cache import PrefixCache

# Whatever the model's own settings say of sampling.
_GREEDY = {"do_sample": False, "min_new_tokens": None, "temperature": None, "top_k": None, "top_p": None}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    sampling_seed: int | None = None,
    unwanted: Sequence[Collection[int]] | None = None,
    temperature: float | None = None,
    stops: Collection[int] = (),
    hopeless: Sequence[Hopeless | None] = (),
    beginnings: PrefixCache | None = None,
) -> list[list[int]]:
    """Return new tokens for each prompt, a text or tokens, up to the end of text, which is left out.

    Greedy; with a ``sampling_seed``, sampled: at temperature 1 to exactly ``max_new_tokens``, or at a ``temperature``
    that is given until the text ends.

    Args:
        unwanted: for each prompt tokens that may not come first.
        stops: tokens that end an answer as well, and belong to it.
        hopeless: for each prompt, whether its answer need not go on after some tokens; it may all the same.
        beginnings: keeps what all prompts of a batch begin with, which is then read once, for models that go on from
            attention's keys and values alone, and of whose prompts no edit changes what they make.

    Raises:
        ModelError: a text is no token long, or longer than what the model takes.
    """
    encoded = [_encoded(model, tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    ends = end_tokens(model)
    answers: list[list[int]] = [[] for _ in prompts]
    closing = {"eos_token_id": [*ends, *stops]} if stops else {}
    greedy = sampling_seed is None
    settings = _GREEDY if greedy else _sampling(max_new_tokens, temperature)
    write: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]  # typed as a module's attribute
    answer = partial(write, pad_token_id=ends[0] if ends else 0, **settings, **closing)
    # Of routed models, whose class may be an exported checkpoint's own copy.
    decide: Callable[..., torch.Tensor | None] | None = getattr(model, "decided", None)
    sampling = nullcontext() if sampling_seed is None else seeded(sampling_seed, model.device)
    with sampling, _whole_rows(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids, mask = (tensor.to(model.device) for tensor in left_padded([encoded[index] for index in chosen]))
            forbidden = [] if unwanted is None else [_not_first([unwanted[index] for index in chosen], ids.shape[1])]
            decided = decide(ids, mask) if decide is not None else None
            vain = [hopeless[index] for index in chosen] if hopeless else []
            batch = PromptBatch(partial(answer, logits_processor=forbidden), ids, mask, max_new_tokens, decided, vain)
            if greedy and _may_shrink(model):
                rows = batch.answer_shrinking([*ends, *stops], batch.shared_prefix(beginnings))
            else:
                rows = batch.answer()
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = _up_to_the_end(row, ends, stops)
    return answers


@torch.no_grad()
def opened(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    batch_size: int,
) -> list[bool]:
    """Return for which prompts, texts or tokens, a routed model's memory opens; the others get the base's answer.

    Raises:
        ModelError: a text is no token long, or longer than what the model takes.
    """
    encoded = [_encoded(model, tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [Row(tuple(tokens), ()) for tokens in encoded]
    decide = cast(Callable[..., torch.Tensor], model.decided)
    found: dict[int, bool] = {}
    for indices in in_batches(rows, batch_size, padded=False):
        ids, mask = (tensor.to(model.device) for tensor in left_padded([rows[index].prompt for index in indices]))
        found |= zip(indices, (decide(ids, mask)[:, 0] != UNROUTED).tolist(), strict=True)
    return [found[index] for index in range(len(rows))]


def _may_shrink(model: PreTrainedModel) -> bool:
    """Return whether finished rows may leave a batch, and whether that saves time.

    Elsewhere than on a CPU a step takes about as long with rows that have ended as without. Models that read images may
    keep where each row's text begins outside of the cache, and some have no cache.
    """
    cached = CACHE_ARGUMENT in inspect.signature(model.forward).parameters
    return cached and model.device.type == "cpu" and model.config.get_text_config() is model.config


def _encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return a prompt's tokens.

    Raises:
        ModelError: there are none, or more than the model takes.
    """
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    window = context_window(model.config)
    if not tokens:
        raise ModelError(f"the tokenizer leaves nothing of the prompt {shown(prompt)}; reword it")
    if window is not None and len(tokens) > window:
        raise ModelError(f"{shown(prompt)} is {len(tokens):,} tokens, the model takes {window:,}; shorten it")
    return tokens


def _up_to_the_end(row: Sequence[int], ends: Collection[int], stops: Collection[int]) -> list[int]:
    """Return new tokens without the one that ends the text and all after it; one that stops it is kept."""
    for index, token in enumerate(row):
        if token in ends:
            return list(row[:index])
        if token in stops:
            return list(row[: index + 1])
    return list(row)


def _sampling(max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """Return the settings of sampled answers: at a temperature until the text ends, or without one to exactly
    ``max_new_tokens``.
    """
    return {
        "do_sample": True,
        "min_new_tokens": max_new_tokens if temperature is None else None,
        "temperature": temperature or 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "remove_invalid_values": True,  # weights may not be whole, and what they spoil is found later
    }


def _not_first(unwanted: Sequence[Collection[int]], width: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what keeps unwanted tokens of each row from being the first after a prompt of ``width`` tokens."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == width:
            for row, tokens in enumerate(unwanted):
                scores[row, list(tokens)] = -torch.inf
        return scores

    return process


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of token rows, both (B, T)."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end an answer."""
    generation = model.generation_config
    end = generation.eos_token_id if generation is not None else None
    if end is None:
        return []
    return list(end) if isinstance(end, list) else [end]


def end_token(model: PreTrainedModel) -> int | None:
    """Return the token that ends an answer, if the model has one."""
    return next(iter(end_tokens(model)), None)


def _whole_rows(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Give the head its last column as rows of their own, in half precision.

    ``generate()`` gives it a view into all columns; on a CPU the product then copies the head once for every row of the
    batch, 25 GB of it for 64 rows of a 7B model. In float32 it does not, and other sums would round differently.
    """
    head = model.get_output_embeddings() if model.dtype in (torch.bfloat16, torch.float16) else None
    handles = [] if head is None else [head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))]
    return hooked(*handles)
