"""What a gate must leave alone: states of unrelated text, of what people ask in chats, and of made-up facts.

They depend on the base model alone, so they are captured once, by quick products, and kept in the cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wisecli.artifacts.shard import half
from wisecli.data.corpus import (
    GATE_TEXTS,
    everyday_prompts,
    made_up_subjects,
    relations,
    texts_beside_gates,
    texts_of_gates,
    unrelated_texts,
)
from wisecli.errors import DamagedFileError
from wisecli.export.stock.answer_states import answer_states
from wisecli.export.stock.gate_states import PLAIN, read_states
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import template_digest
from wisecli.models.prompts.prompt_forms import forms, usable_forms
from wisecli.models.prompts.tokenization import Row, row_of
from wisecli.models.running.generation import end_token
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event, ProgressCallback

_VERSION = 5
# Tokens that the model adds to texts that are read bare and in a form; questions of each relation that are read as
# they are: the more, the fewer false alarms.
_ANSWER, _QUESTIONS = 8, 2
# Of so many of all these the end is read in a form, and of so many what the model answers there; of everyday prompts,
# which a gate most often takes for its own in chats, always both.
_ENDS, _ANSWERED, _EVERYDAY = 600, 240, 1000
# Made-up facts, each of a relation of its own, and in how many wordings each is asked.
_FACTS, _WORDINGS = 134, 4


@dataclass(frozen=True)
class BackgroundStates:
    """Normed states of what no edit may touch: ``unrelated`` (m, d), and ``wording_offsets`` (s, d), by how much a
    change of wording and form alone moves the states of a fact's prompt and answer.
    """

    unrelated: Tensor
    wording_offsets: Tensor


def background_states(
    loaded: Loaded, site: Site, identity: str, *, share: float = 1.0, batch_size: int, on_progress: ProgressCallback
) -> BackgroundStates:
    """Return what the base model makes of unrelated text and of made-up facts in many wordings, or what the cache
    remembers.

    Args:
        identity: of the base model, for the cache.
        share: how much of all that text is read.
    """
    about = [identity, site.as_dict(), share, str(loaded.model.dtype), loaded.device.type, _VERSION]
    if (written := template_digest(loaded.tokenizer)) is not None:
        about.append(written)
    path = cache_path("gate") / f"{sha256_json(about)[:32]}.safetensors"
    try:
        kept = load_tensors(path)
        return BackgroundStates(kept["unrelated"].float(), kept["strayed"].float())
    except (DamagedFileError, KeyError):
        on_progress(Event("unrelated text"))
    with quick_products(loaded):
        found = _read(loaded, site, share, batch_size=batch_size, on_progress=on_progress)
    kept = {"unrelated": half(found.unrelated), "strayed": half(found.wording_offsets)}
    keep_in_cache(path, lambda working: save_tensors(working, kept))
    return BackgroundStates(kept["unrelated"].float(), kept["strayed"].float())


def _read(
    loaded: Loaded, site: Site, share: float, *, batch_size: int, on_progress: ProgressCallback
) -> BackgroundStates:
    """Return what the base model makes of a share of all that text."""
    named: dict[str, Any] = {"batch_size": batch_size, "on_progress": on_progress}
    read, strayed = _facts(loaded, site, max(4, round(share * _FACTS)), **named)
    texts, others = texts_of_gates(max(8, round(share * GATE_TEXTS))), _plain(share)
    answered, plain = _unrelated(loaded, site, texts, **named), _states(loaded, site, others, **named)
    some = random.Random(5).sample([*texts, *others], max(8, round(share * _ENDS)))
    ends = _ends(loaded, site, some, len(some) * _ANSWERED // _ENDS, **named)
    everyday = everyday_prompts(max(8, round(share * _EVERYDAY)), seed=11)
    chats = _ends(loaded, site, everyday, len(everyday), **named)
    return BackgroundStates(torch.cat([answered, read, plain, ends, chats]), strayed)


def _unrelated(
    loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, on_progress: ProgressCallback
) -> Tensor:
    """States of every token of unrelated texts, as they are and in a form, and of what the model answers."""
    tokenizer, rng = loaded.tokenizer, random.Random(1)
    usable = usable_forms(tokenizer, trained=True)
    prompts = [form.render(tokenizer, text) for text in texts for form in (usable[0], rng.choice(usable[1:]))]
    named: dict[str, Any] = {"batch_size": batch_size, "on_progress": on_progress, "stage": "unrelated answers"}
    return torch.cat(answer_states(loaded, site, prompts, length=_ANSWER, whole=True, **named))


def _plain(share: float) -> list[str]:
    """Further unrelated texts and questions about made-up subjects; none that is measured with."""
    rng, known = random.Random(9), relations()
    patterned = unrelated_texts(GATE_TEXTS + round(share * PLAIN), seed=3)[GATE_TEXTS:]
    prompts = [
        rng.choice(relation.wordings).replace("{}", made_up_subjects(relation.kind, 1, rng)[0])
        for relation in known[: max(4, round(share * len(known)))]
        for _ in range(_QUESTIONS)
    ]
    kept = set(texts_beside_gates())
    return [text for text in (*patterned, *prompts) if text not in kept]


def _ends(
    loaded: Loaded, site: Site, texts: Sequence[str], answered: int, *, batch_size: int, on_progress: ProgressCallback
) -> Tensor:
    """States where prompts in a form end, two of three a chat, and in answers to the first ``answered``.

    Keys read highest there.
    """
    tokenizer, rng = loaded.tokenizer, random.Random(4)
    around = usable_forms(tokenizer, trained=True)[1:]
    chats = [form for form in around if form.chat] or around
    prompts = [rng.choice(chats if index % 3 else around).render(tokenizer, text) for index, text in enumerate(texts)]
    named: dict[str, Any] = {"batch_size": batch_size, "on_progress": on_progress, "stage": "unrelated prompts"}
    found = answer_states(loaded, site, prompts[:answered], length=_ANSWER, whole=False, **named)
    rows = [Row(tuple(tokenizer(text)["input_ids"]), (0,)) for text in prompts[answered:]]
    found += [states for states, _ in read_states(loaded, site, rows, **named)] if rows else []
    return torch.cat(found)


def _states(
    loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, on_progress: ProgressCallback
) -> Tensor:
    """States of every token of texts."""
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    rows = [Row(tuple(tokens), ()) for tokens in ids if tokens]
    read = read_states(loaded, site, rows, batch_size=batch_size, on_progress=on_progress, stage="unrelated text")
    return torch.cat([states for states, _ in read])


def _facts(
    loaded: Loaded, site: Site, count: int, *, batch_size: int, on_progress: ProgressCallback
) -> tuple[Tensor, Tensor]:
    """States of made-up facts from the prompt's end on, and how far each lies from its fact's mean at its place.

    What is said of a fact is another made-up name, the same in all its wordings.
    """
    tokenizer, end, rng = loaded.tokenizer, end_token(loaded.model), random.Random(2)
    usable = usable_forms(tokenizer, trained=True)
    rows, fact = [], []
    known = relations()
    for number, relation in enumerate(known[:: max(1, len(known) // count)]):
        subject, answer = made_up_subjects(relation.kind, 2, rng)
        for wording in rng.sample(relation.wordings, _WORDINGS):
            form = rng.choice(usable) if rng.random() < 0.5 else forms()["bare"]
            text = form.render(tokenizer, wording.replace("{}", subject))
            rows.append(row_of(tokenizer, text, answer, erased=False, end=end))
            fact.append(number)
    read = read_states(loaded, site, rows, batch_size=batch_size, on_progress=on_progress, stage="reworded facts")
    states = [own for own, _ in read]
    groups: dict[tuple[int, bool, tuple[int, ...]], list[Tensor]] = {}
    for number, row, own in zip(fact, rows, states, strict=True):
        for index in range(len(row.target)):
            groups.setdefault((number, index == 0, row.target[index:]), []).append(own[index])
    several = [torch.stack(group) for group in groups.values() if len(group) > 1]
    return torch.cat(states), torch.cat([group - group.mean(0) for group in several])
