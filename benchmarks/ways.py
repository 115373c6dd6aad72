"""Whether a routed checkpoint answers the same however its prompts are run: cut, cached, batched, guessed, copied.

    python benchmarks/ways.py edited prompts.jsonl --base model

Every way is compared with one plain ``generate()``, token for token; ``prompts.jsonl`` has a ``prompt`` a line. They
are asked bare and, where the model has a template, in chat.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runner import Row, run, show
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)

from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.routing.passes.token_cache import cache_returned

LENGTH = 12
Way = Callable[["Asked"], list[int]]


class Asked:
    """One prompt's tokens ``ids`` (1, T), and the model that answers it."""

    def __init__(self, model: Any, base: Any, ids: Tensor, chat: bool) -> None:
        self.model, self.base, self.ids, self.chat = model, base, ids, chat

    def plain(self, **options: Any) -> list[int]:
        """The answer of one ``generate()``."""
        options = {"max_new_tokens": LENGTH, "do_sample": False, **options}
        ids = options.pop("ids", self.ids)
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found: list[int] = output[0, ids.shape[1] :].tolist()
        return found


def cached(**named: Any) -> dict[str, Any]:
    """A cache as passes take it."""
    return {CACHE_ARGUMENT: named.get("cache"), "use_cache": True}


def chunked(asked: Asked, size: int) -> list[int]:
    """In chunks of so many tokens."""
    return asked.plain(prefill_chunk_size=size)


def prefixed(asked: Asked, length: int, *, by_base: bool = False) -> list[int]:
    """Behind a cache of the first tokens."""
    model = asked.base if by_base else asked.model
    cache = cache_returned(model(asked.ids[:, :length], **cached(cache=DynamicCache(config=model.config))))
    return asked.plain(**{CACHE_ARGUMENT: cache})


def loop(asked: Asked, size: int) -> list[int]:
    """In a bare loop of passes over so many tokens, greedy."""
    cache: Any = DynamicCache(config=asked.model.config)
    for part in asked.ids.split(size, 1):
        output = asked.model(part, **cached(cache=cache))
    said: list[int] = []
    ends = asked.model.generation_config.eos_token_id
    while True:
        token = int(output.logits[0, -1].argmax())
        said.append(token)
        if token in (ends if isinstance(ends, list) else [ends]) or len(said) == LENGTH:
            return said
        output = asked.model(torch.tensor([[token]]), **cached(cache=cache))


def begun(asked: Asked, length: int) -> Any:
    """What ``generate()`` returns for an answer of so many tokens, its cache included."""
    return asked.model.generate(
        asked.ids,
        attention_mask=torch.ones_like(asked.ids),
        max_new_tokens=length,
        do_sample=False,
        return_dict_in_generate=True,
    )


def copied(asked: Asked) -> list[int]:
    """Cut short, and gone on with on a copy of the cache."""
    output = begun(asked, 3)
    said: list[int] = output.sequences[0, asked.ids.shape[1] :].tolist()
    cache = copy.deepcopy(cache_returned(output))
    ends = asked.model.generation_config.eos_token_id
    while len(said) < LENGTH and said[-1] not in (ends if isinstance(ends, list) else [ends]):
        output = asked.model(torch.tensor([[said[-1]]]), **cached(cache=cache))
        said.append(int(output.logits[0, -1].argmax()))
    return said


def cropped(asked: Asked) -> list[int]:
    """On a cache from which an answer was cropped again."""
    output = begun(asked, 5)
    cache = cache_returned(output)
    cache.crop(asked.ids.shape[1] - 1 - cache.get_seq_length())
    return asked.plain(**{CACHE_ARGUMENT: cache})


def single_prompts() -> Iterator[tuple[str, Way]]:
    """All ways to run one prompt, by their names."""
    for size in (1, 2, 3, 4, 5, 7, 8, 13):
        yield f"chunks of {size}", partial(chunked, size=size)
    yield "prefix of all but one", lambda asked: prefixed(asked, asked.ids.shape[1] - 1)
    yield "prefix of one", lambda asked: prefixed(asked, 1)
    yield "prefix of half", lambda asked: prefixed(asked, asked.ids.shape[1] // 2)
    yield "prefix by the base", lambda asked: prefixed(asked, asked.ids.shape[1] - 1, by_base=True)
    yield "token by token (chat)", lambda asked: loop(asked, 1) if asked.chat else asked.plain()
    yield "loop in fives (chat)", lambda asked: loop(asked, 5) if asked.chat else asked.plain()
    yield "loop, one pass", lambda asked: loop(asked, 10_000)
    yield "no cache", lambda asked: asked.plain(use_cache=False)
    yield "static cache", lambda asked: asked.plain(cache_implementation="static")
    yield "given static cache", lambda asked: asked.plain(**{CACHE_ARGUMENT: StaticCache(asked.model.config, 512)})
    yield "cropped cache", cropped
    yield "copied cache", copied
    yield "prompt lookup", lambda asked: asked.plain(prompt_lookup_num_tokens=3)
    yield "assistant", lambda asked: asked.plain(assistant_model=asked.base)
    yield "early exit", lambda asked: asked.plain(assistant_early_exit=6)
    yield (
        "guessing in a GenerationConfig",
        lambda asked: asked.plain(
            generation_config=GenerationConfig(
                max_new_tokens=LENGTH,
                prompt_lookup_num_tokens=3,
                eos_token_id=asked.model.generation_config.eos_token_id,
                pad_token_id=0,
            )
        ),
    )


def batches(asked: list[Asked], pad: int) -> list[list[int]]:
    """All prompts in one batch, padded on the left."""
    width = max(one.ids.shape[1] for one in asked)
    ids = torch.stack([torch.nn.functional.pad(one.ids[0], (width - one.ids.shape[1], 0), value=pad) for one in asked])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(one.ids[0]), (width - one.ids.shape[1], 0)) for one in asked]
    )
    output = asked[0].model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
    return [row.tolist() for row in output[:, width:]]


def right_padded(asked: list[Asked], pad: int) -> list[int]:
    """The first token of every answer, by one pass over all prompts, padded on the right."""
    width = max(one.ids.shape[1] for one in asked)
    ids = torch.stack([torch.nn.functional.pad(one.ids[0], (0, width - one.ids.shape[1]), value=pad) for one in asked])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(one.ids[0]), (0, width - one.ids.shape[1])) for one in asked]
    )
    logits = asked[0].model(ids, attention_mask=mask).logits
    return [int(row[one.ids.shape[1] - 1].argmax()) for row, one in zip(logits, asked, strict=True)]


def in_threads(asked: list[Asked], count: int = 8) -> list[list[int]]:
    """All prompts by one model, in so many threads at a time."""
    said: dict[int, list[int]] = {}

    def work(first: int) -> None:
        with torch.no_grad():
            for place in range(first, len(asked), count):
                said[place] = asked[place].plain()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return [said.get(place, []) for place in range(len(asked))]


def continuous(asked: list[Asked]) -> list[list[int]]:
    """All prompts by continuous batching, by a copy, as it changes how the model attends."""
    model = copy.deepcopy(asked[0].model)
    config = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0
    )
    found = model.generate_batch([one.ids[0].tolist() for one in asked], generation_config=config, progress_bar=False)
    return [list(found[name].generated_tokens) for name in sorted(found, key=lambda name: int(name.split("_")[-1]))]


def other_objects(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Models that were copied, kept or compiled."""

    def kept() -> Any:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)

    def compiled() -> Any:
        found = copy.deepcopy(model)
        found.forward = torch.compile(found.forward)
        return found

    yield "torch.save and load", kept
    yield "deepcopy", partial(copy.deepcopy, model)
    yield "compiled", compiled


def ended(said: list[int], ends: list[int]) -> list[int]:
    """An answer up to its end."""
    for place, token in enumerate(said):
        if token in ends:
            return said[:place]
    return said


@torch.no_grad()
def ways(options: Namespace) -> None:
    """Count answers that differ from those of one plain ``generate()``, in every way of running a prompt."""
    model = AutoModelForCausalLM.from_pretrained(options.edited, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(options.base)
    tokenizer = AutoTokenizer.from_pretrained(options.edited, trust_remote_code=True)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
    texts = [(prompt, False) for prompt in prompts]
    if tokenizer.chat_template:
        texts += [(chat_prompt(tokenizer, prompt), True) for prompt in prompts]
    asked = [Asked(model, base, torch.tensor([tokenizer(text)["input_ids"]]), chat) for text, chat in texts]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    plain = [ended(one.plain(), ends) for one in asked]
    by_base = [ended(Asked(base, base, one.ids, one.chat).plain(), ends) for one in asked]
    changed = sum(one != other for one, other in zip(plain, by_base, strict=True))
    rows: list[Row] = []

    def add(name: str, answer: Callable[[], list[list[int]]], right: list[list[int]] = plain) -> None:
        if options.only not in name:
            return
        try:
            found = answer()
            wrong = str(sum(ended(one, ends) != other for one, other in zip(found, right, strict=True)))
        except Exception as error:  # what fails is part of the table
            wrong = f"{type(error).__name__}: {error}"[:70]
        rows.append({"way": name, "other answers": wrong, "of": len(right)})
        print(f"{name}: {wrong} of {len(right)}", file=sys.stderr)

    for name, way in single_prompts():
        add(name, lambda way=way: [way(one) for one in asked])  # type: ignore[misc]
    add("batch, padded on the left", lambda: batches(asked, 0))
    add("padded on the right, first token", lambda: [[t] for t in right_padded(asked, 0)], [one[:1] for one in plain])
    add("fp8 cache", lambda: [one.plain(**{CACHE_ARGUMENT: QuantizedCache("fp8", model.config)}) for one in asked])
    add("offloaded cache", lambda: [one.plain(cache_implementation="offloaded") for one in asked])
    add("eight threads", lambda: in_threads(asked))
    add("generate_batch", lambda: continuous(asked))
    for name, make in other_objects(model):
        add(name, lambda make=make: [Asked(make_once(make), base, o.ids, o.chat).plain() for o in asked])  # type: ignore[misc]
    show(rows, options, title=f"{len(asked)} prompts, {changed} of them answered otherwise than by the base", width=100)


_MADE: dict[Any, Any] = {}


def make_once(make: Callable[[], Any]) -> Any:
    """A model that is made when it is first asked."""
    if make not in _MADE:
        _MADE[make] = make()
    return _MADE[make]


def ways_options(parser: ArgumentParser) -> None:
    parser.add_argument("edited", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--base", required=True, help="the unedited model")
    parser.add_argument("--only", default="", help="ways with this in their names alone")


if __name__ == "__main__":
    run(__doc__, {"ways": (ways, ways_options)})
