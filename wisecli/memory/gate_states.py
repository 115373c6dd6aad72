"""What a gate is fitted to: states that leave the edited layer, of the edits and of all that they must leave alone.

The gate of a stock checkpoint reads the RMS-normed state ``u`` after the edited layer. It depends on the text alone, as
nothing below is edited, so what a gate is to tell apart can be captured from the base model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.artifacts.shard import half
from wisecli.data.corpus import made_up_subjects, relations, unrelated_texts
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.activations import Activations, captured
from wisecli.models.forms import forms, usable_forms
from wisecli.models.generation import end_token, generate
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
from wisecli.models.tokenization import Row, collate, in_batches, row_of
from wisecli.progress import Event, Watcher
from wisecli.routing.scores import MemoryScores

_VERSION = 3
# Unrelated texts that are read, bare and in a form; tokens that the model adds to each; texts that are read as they
# are, with so many questions of each relation: the more, the fewer false alarms.
TEXTS, _ANSWER, _PLAIN, _QUESTIONS = 120, 8, 900, 2
# Of so many of all these the end is read in a form, and of so many what the model answers there.
_ENDS, _ANSWERED = 600, 240
# Made-up facts, each of a relation of its own, and in how many wordings each is asked.
_FACTS, _WORDINGS = 134, 4
# An edit's answer is also read after so many beginnings of unrelated texts, of so many words at least and at most, and
# after the prompt of the edit that is so much further on.
_CUT, _SHORTEST, _LONGEST, _FURTHER = 8, 3, 14, 7


@dataclass(frozen=True)
class OwnStates:
    """Normed states (n, d) at which edits are to be answered, and the ``key`` (n,) that each is to open.

    A key stands for what is left to say of one edit's answer: ``edits`` (K,) are the edits' numbers, ``inside`` (K,)
    says whether some of the answer was said before, ``values`` (K, d) are what the memory adds. ``others`` (m, d) are
    states inside the same answers after prompts that are not theirs.
    """

    states: Tensor
    key: Tensor
    edits: Tensor
    inside: Tensor
    values: Tensor
    others: Tensor


@dataclass(frozen=True)
class Background:
    """Normed states of what no edit may touch: ``unrelated`` (m, d), and ``strayed`` (s, d), by how much a change of
    wording and form alone moves the states of a fact's prompt and answer.
    """

    unrelated: Tensor
    strayed: Tensor


def normed(states: Tensor, epsilon: float) -> Tensor:
    """States (..., d) as a decoder block's own norm of weight 1 gives them."""
    wide = states.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


def own_states(loaded: Loaded, manifest: Manifest, *, batch_size: int, watch: Watcher) -> OwnStates:
    """The states of a memory's edits, in all forms that are trained, and what the memory adds there."""
    rows, numbers = _asked(loaded, manifest.edits)
    scores = MemoryScores(manifest.memory)
    read = _window(loaded, manifest.site, rows, batch_size=batch_size, watch=watch, stage="edits")
    epsilon = _epsilon(loaded)
    places: dict[tuple[int, bool, tuple[int, ...]], int] = {}
    key: list[int] = []
    states: list[Tensor] = []
    added: list[Tensor] = []
    for row, number, (hidden, keys) in zip(rows, numbers, read, strict=True):
        inside = torch.arange(len(row.target)) > 0
        states.append(normed(hidden, epsilon))
        added.append(_residuals(scores, manifest, keys, number, inside))
        for place in range(len(row.target)):
            left = (number, place == 0, row.target[place:])
            key.append(places.setdefault(left, len(places)))
    which = torch.tensor(key)
    values = torch.cat(added)
    first = torch.full((len(places),), len(which)).scatter_reduce(0, which, torch.arange(len(which)), "amin")
    edits = torch.tensor([number for number, _, _ in places])
    within = torch.tensor([not begins for _, begins, _ in places])
    others = _elsewhere(loaded, manifest, batch_size=batch_size, watch=watch)
    return OwnStates(torch.cat(states), which, edits, within, values[first], others)


def _asked(loaded: Loaded, edits: Sequence[Edit]) -> tuple[list[Row], list[int]]:
    """The rows of edits in every form, and the edit that each is of; of edits that ask the same, the last."""
    tokenizer, end = loaded.tokenizer, end_token(loaded.model)
    trained = usable_forms(tokenizer, trained=True)
    found: dict[str, tuple[Row, int]] = {}
    for number, edit in enumerate(edits):
        own = [(edit.prompt, edit.answer), *((one.prompt, one.target) for one in edit.translations)]
        texts = {form.asked(tokenizer, prompt): answer for prompt, answer in own for form in trained}
        for text, answer in texts.items():
            found[text] = row_of(tokenizer, text, answer, erased=edit.erased, end=end), number
    return [row for row, _ in found.values()], [number for _, number in found.values()]


def _residuals(scores: MemoryScores, manifest: Manifest, keys: Tensor, number: int, inside: Tensor) -> Tensor:
    """What a memory adds at keys (n, d_ff) of one of its edits once that is opened: (n, d)."""
    if scores.kind == "lookup":
        _, place = scores.of_edits(keys.float(), torch.full((len(keys),), number), inside)
        return scores.values[scores.value[place]].float()
    name = manifest.edits[number].id
    memory = next((place for place, owned in enumerate(manifest.owners) if name in owned), 0)
    return scores.update(keys.float(), memory)


def _elsewhere(loaded: Loaded, manifest: Manifest, *, batch_size: int, watch: Watcher) -> Tensor:
    """States inside the edits' answers where they stand after prompts that they do not answer."""
    tokenizer, end = loaded.tokenizer, end_token(loaded.model)
    told = [edit for edit in manifest.edits if not edit.erased]
    rows = []
    for place, edit in enumerate(told):
        further = told[(place + _FURTHER) % len(told)].prompt
        pairs = _beginnings(edit.answer, random.Random(place))
        if further != edit.prompt:
            pairs.append((further, edit.answer))
        rows += [row_of(tokenizer, text, answer, erased=False, end=end) for text, answer in pairs]
    read = _window(loaded, manifest.site, rows, batch_size=batch_size, watch=watch, stage="answers elsewhere")
    states = [hidden[1:] for hidden, _ in read]
    return normed(torch.cat(states or [torch.empty(0, manifest.site.d)]), _epsilon(loaded))


def _beginnings(answer: str, chance: random.Random) -> list[tuple[str, str]]:
    """Beginnings of unrelated texts, each with an edit's answer to go after it; half of them in small letters."""
    begun = [" ".join(text.split()[: chance.randint(_SHORTEST, _LONGEST)]) for text in chance.sample(_apart(), _CUT)]
    plain, small = begun[::2], [text.lower() for text in begun[1::2]]
    return [*((text, answer) for text in plain), *zip(small, [answer, answer.lower()] * len(small), strict=False)]


@cache
def _apart() -> list[str]:
    """Unrelated texts that nothing is measured with."""
    kept = set(texts_beside())
    return [text for text in unrelated_texts(_PLAIN, seed=7)[TEXTS:] if text not in kept]


def background(
    loaded: Loaded, site: Site, identity: str, *, share: float = 1.0, batch_size: int, watch: Watcher
) -> Background:
    """What the base model makes of unrelated text and of made-up facts in many wordings, or what the cache remembers.

    Args:
        identity: of the base model, for the cache.
        share: how much of all that text is read.
    """
    about = [identity, site.as_dict(), share, str(loaded.model.dtype), loaded.device.type, _VERSION]
    path = cache_path("gate") / f"{sha256_json(about)[:32]}.safetensors"
    try:
        kept = load_tensors(path)
        return Background(kept["unrelated"].float(), kept["strayed"].float())
    except (DamagedFileError, KeyError):
        watch(Event("unrelated text"))
    named: dict[str, Any] = {"batch_size": batch_size, "watch": watch}
    read, strayed = _facts(loaded, site, max(4, round(share * _FACTS)), **named)
    texts, others = unrelated_texts(2 * TEXTS, seed=0)[: 2 * max(8, round(share * TEXTS)) : 2], _plain(share)
    answered, plain = _unrelated(loaded, site, texts, **named), _states(loaded, site, others, **named)
    ends = _ends(loaded, site, random.Random(5).sample([*texts, *others], max(8, round(share * _ENDS))), **named)
    unrelated = torch.cat([answered, read, plain, ends])
    kept = {"unrelated": half(unrelated), "strayed": half(strayed)}
    keep_in_cache(path, lambda working: save_tensors(working, kept))
    return Background(kept["unrelated"].float(), kept["strayed"].float())


def texts_beside(texts: int = TEXTS) -> list[str]:
    """Unrelated texts that no gate was fitted to."""
    return unrelated_texts(2 * TEXTS, seed=0)[1::2][:texts]


def _unrelated(loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, watch: Watcher) -> Tensor:
    """States of every token of unrelated texts, as they are and in a form, and of what the model answers."""
    tokenizer, chance = loaded.tokenizer, random.Random(1)
    usable = usable_forms(tokenizer, trained=True)
    asked = [form.asked(tokenizer, text) for text in texts for form in (usable[0], chance.choice(usable[1:]))]
    answers = generate(loaded.model, tokenizer, asked, max_new_tokens=_ANSWER, batch_size=batch_size)
    whole = [(*tokenizer(text)["input_ids"], *answer) for text, answer in zip(asked, answers, strict=True)]
    return _states(loaded, site, whole, batch_size=batch_size, watch=watch)


def _plain(share: float) -> list[str]:
    """Further unrelated texts and questions about made-up subjects; none that is measured with."""
    chance, known = random.Random(9), relations()
    patterned = unrelated_texts(TEXTS + round(share * _PLAIN), seed=3)[TEXTS:]
    asked = [
        chance.choice(relation.wordings).replace("{}", made_up_subjects(relation.kind, 1, chance)[0])
        for relation in known[: max(4, round(share * len(known)))]
        for _ in range(_QUESTIONS)
    ]
    kept = set(texts_beside())
    return [text for text in (*patterned, *asked) if text not in kept]


def _ends(loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, watch: Watcher) -> Tensor:
    """States where prompts in a form end, two of three a chat, and in some of the answers: keys read highest there."""
    tokenizer, chance = loaded.tokenizer, random.Random(4)
    around = usable_forms(tokenizer, trained=True)[1:]
    chats = [form for form in around if form.chat] or around
    asked = [chance.choice(chats if place % 3 else around).asked(tokenizer, text) for place, text in enumerate(texts)]
    some = asked[: len(asked) * _ANSWERED // _ENDS]
    answers = generate(loaded.model, tokenizer, some, max_new_tokens=_ANSWER, batch_size=batch_size)
    whole = zip_longest(asked, answers, fillvalue=())
    rows = [Row(tuple(tokenizer(text)["input_ids"]), (*answer, 0)) for text, answer in whole]
    read = _window(loaded, site, rows, batch_size=batch_size, watch=watch, stage="unrelated prompts")
    return normed(torch.cat([hidden for hidden, _ in read]), _epsilon(loaded))


def _states(
    loaded: Loaded, site: Site, texts: Sequence[str | Sequence[int]], *, batch_size: int, watch: Watcher
) -> Tensor:
    """States of every token of texts, or of tokens."""
    told = [loaded.tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
    rows = [Row(tuple(tokens), ()) for tokens in told if tokens]
    read = _window(loaded, site, rows, batch_size=batch_size, watch=watch, stage="unrelated text")
    return normed(torch.cat([hidden for hidden, _ in read]), _epsilon(loaded))


def _facts(loaded: Loaded, site: Site, count: int, *, batch_size: int, watch: Watcher) -> tuple[Tensor, Tensor]:
    """States of made-up facts from the prompt's end on, and how far each lies from its fact's mean at its place.

    What is said of a fact is another made-up name, the same in all its wordings.
    """
    tokenizer, end, chance = loaded.tokenizer, end_token(loaded.model), random.Random(2)
    usable = usable_forms(tokenizer, trained=True)
    rows, fact = [], []
    known = relations()
    for number, relation in enumerate(known[:: max(1, len(known) // count)]):
        subject, answer = made_up_subjects(relation.kind, 2, chance)
        for wording in chance.sample(relation.wordings, _WORDINGS):
            form = chance.choice(usable) if chance.random() < 0.5 else forms()["bare"]
            text = form.asked(tokenizer, wording.replace("{}", subject))
            rows.append(row_of(tokenizer, text, answer, erased=False, end=end))
            fact.append(number)
    read = _window(loaded, site, rows, batch_size=batch_size, watch=watch, stage="reworded facts")
    states = [normed(hidden, _epsilon(loaded)) for hidden, _ in read]
    groups: dict[tuple[int, bool, tuple[int, ...]], list[Tensor]] = {}
    for number, row, own in zip(fact, rows, states, strict=True):
        for place in range(len(row.target)):
            groups.setdefault((number, place == 0, row.target[place:]), []).append(own[place])
    several = [torch.stack(group) for group in groups.values() if len(group) > 1]
    return torch.cat(states), torch.cat([group - group.mean(0) for group in several])


def _window(
    loaded: Loaded,
    site: Site,
    rows: Sequence[Row],
    *,
    batch_size: int,
    watch: Watcher,
    stage: str,
) -> list[tuple[Tensor, Tensor]]:
    """What leaves the edited layer (n, d), and the matrix' keys (n, d_ff), of each row.

    At its prompt's last token and every target token but the last; without a target, at all its tokens.
    """
    window = any(row.target for row in rows)
    groups = list(in_batches(rows, batch_size, by_beginning=True))
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    read = captured(loaded.model, site, batches, stream=loaded.stream, above=False, window=window, shared=True)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, activations in zip(groups, read, strict=True):
        for place, index in enumerate(indices):
            found[index] = _of_row(activations, place, len(rows[index].target) if window else None)
        watch(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def _of_row(activations: Activations, place: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Hidden states and keys of one row of a batch: its first ``count`` columns, or all that are no padding."""
    real = activations.batch.mask[place].bool() if count is None else slice(count)
    return activations.hidden[place, real].float().cpu(), activations.keys[place, real].float().cpu()


def _epsilon(loaded: Loaded) -> float:
    return float(loaded.model.config.rms_norm_eps)
