"""What a gate is to open for: states that leave the edited layer, at edits' prompts and in their answers.

The gate of a stock checkpoint reads the RMS-normed state ``u`` after the edited layer. It depends on the text alone, as
nothing below is edited, so what a gate is to tell apart can be captured from the base model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.data.corpus import GATE_TEXTS, texts_beside_gates, unrelated_texts
from wisecli.edits.record import Edit
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import Row, collate, in_batches, row_of
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.generation import end_token
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.layers.routed_layer import memory_module

# Texts that are read as they are.
PLAIN = 900
# An edit's answer is also read after so many beginnings of unrelated texts, of so many words at least and at most, and
# after the prompt of the edit that is so much further on; with many edits after fewer, so many of all at most.
_CUT, _SHORTEST, _LONGEST, _FURTHER = 8, 3, 14, 7
_FEWEST, _BEGINNINGS = 2, 4000
# Forms whose states are read in the model's own type; the others say what else may come near.
_EXACT = ("bare", "chat")


@dataclass(frozen=True)
class EditStates:
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


def edit_states(loaded: Loaded, manifest: Manifest, *, batch_size: int, on_progress: ProgressCallback) -> EditStates:
    """Return the states of a memory's edits, in all forms that are trained, and what the memory adds there."""
    asked = _asked(loaded, manifest.edits)
    memory, memories = memory_module(manifest.memory), _memories(manifest)
    read = _read(loaded, manifest.site, asked, batch_size=batch_size, on_progress=on_progress)
    values: dict[tuple[int, bool, tuple[int, ...]], Tensor] = {}
    places: dict[tuple[int, bool, tuple[int, ...]], int] = {}
    key: list[int] = []
    for one, (_, keys) in zip(asked, read, strict=True):
        left = [(one.edit, index == 0, one.row.target[index:]) for index in range(len(one.row.target))]
        key += [places.setdefault(each, len(places)) for each in left]
        if any(each not in values for each in left):
            inside = torch.arange(len(left)) > 0
            added = memory.residuals_at(keys.float(), memories[one.edit], inside).float()
            for each, value in zip(left, added, strict=True):
                values.setdefault(each, value)
    edits = torch.tensor([number for number, _, _ in places])
    within = torch.tensor([not begins for _, begins, _ in places])
    others = _elsewhere(loaded, manifest, batch_size=batch_size, on_progress=on_progress)
    states, added = torch.cat([hidden for hidden, _ in read]), torch.stack([values[each] for each in places])
    return EditStates(states, torch.tensor(key), edits, within, added, others)


class _Asked(NamedTuple):
    """A prompt of an edit in a form, and the number of the edit; ``exact`` ones are read in the model's own type."""

    row: Row
    edit: int
    exact: bool


def _read(
    loaded: Loaded, site: Site, asked: Sequence[_Asked], *, batch_size: int, on_progress: ProgressCallback
) -> list[tuple[Tensor, Tensor]]:
    """Return states and keys of all that is asked."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for exact in (True, False):
        chosen = [index for index, one in enumerate(asked) if one.exact == exact]
        with nullcontext() if exact else quick_products(loaded, site):
            rows = [asked[index].row for index in chosen]
            read = read_states(loaded, site, rows, batch_size=batch_size, on_progress=on_progress, stage="edits")
        found |= zip(chosen, read, strict=True)
    return [found[index] for index in range(len(asked))]


def _asked(loaded: Loaded, edits: Sequence[Edit]) -> list[_Asked]:
    """Return the prompts of edits in every form; of edits that ask the same, the last."""
    tokenizer, end = loaded.tokenizer, end_token(loaded.model)
    trained = usable_forms(tokenizer, trained=True)
    found: dict[str, _Asked] = {}
    for number, edit in enumerate(edits):
        own = [(edit.prompt, edit.answer), *((one.prompt, one.target) for one in edit.translations)]
        texts = {form.render(tokenizer, prompt): answer for prompt, answer in own for form in trained}
        exact = {form.render(tokenizer, prompt) for prompt, _ in own for form in trained if form.name in _EXACT}
        for text, answer in texts.items():
            row = row_of(tokenizer, text, answer, erased=edit.erased, end=end)
            found[text] = _Asked(row, number, text in exact)
    return list(found.values())


def _memories(manifest: Manifest) -> list[int]:
    """Return the memory that holds each edit."""
    if manifest.memory.by_edit:
        return list(range(len(manifest.edits)))
    owner = {name: index for index, owned in enumerate(manifest.owners) for name in owned}
    return [owner.get(edit.id, 0) for edit in manifest.edits]


def _elsewhere(loaded: Loaded, manifest: Manifest, *, batch_size: int, on_progress: ProgressCallback) -> Tensor:
    """Return states inside the edits' answers, put after prompts that they do not answer."""
    tokenizer, end = loaded.tokenizer, end_token(loaded.model)
    answered = [edit for edit in manifest.edits if not edit.erased]
    count = min(_CUT, max(_FEWEST, _BEGINNINGS // max(1, len(answered))))
    rows = []
    for index, edit in enumerate(answered):
        other_prompt = answered[(index + _FURTHER) % len(answered)].prompt
        pairs = _answers_in_context(edit.answer, count, random.Random(index))
        if other_prompt != edit.prompt:
            pairs.append((other_prompt, edit.answer))
        rows += [row_of(tokenizer, text, answer, erased=False, end=end) for text, answer in pairs]
    with quick_products(loaded, manifest.site):
        read = read_states(
            loaded, manifest.site, rows, batch_size=batch_size, on_progress=on_progress, stage="answers elsewhere"
        )
    states = [hidden[1:] for hidden, _ in read]
    return torch.cat(states or [torch.empty(0, manifest.site.d)])


def _answers_in_context(answer: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Beginnings of unrelated texts, each with an edit's answer to go after it; half of them in small letters."""
    begun = [" ".join(text.split()[: rng.randint(_SHORTEST, _LONGEST)]) for text in rng.sample(_apart(), count)]
    plain, small = begun[::2], [text.lower() for text in begun[1::2]]
    return [*((text, answer) for text in plain), *zip(small, [answer, answer.lower()] * len(small), strict=False)]


@cache
def _apart() -> list[str]:
    """Unrelated texts that nothing is measured with."""
    kept = set(texts_beside_gates())
    return [text for text in unrelated_texts(PLAIN, seed=7)[GATE_TEXTS:] if text not in kept]


def read_states(
    loaded: Loaded,
    site: Site,
    rows: Sequence[Row],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
) -> list[tuple[Tensor, Tensor]]:
    """Return normed states that leave the edited layer (n, d), and the site's keys (n, width), of each row.

    At its prompt's last token and every target token but the last; without a target, at all its tokens.
    """
    window, epsilon = any(row.target for row in rows), float(loaded.model.config.rms_norm_eps)
    groups = list(in_batches(rows, batch_size, by_beginning=True))
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    read = captured(loaded.model, site, batches, stream=loaded.stream, above=False, window=window, shared=True)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, activations in zip(groups, read, strict=True):
        for row, index in enumerate(indices):
            hidden, keys = _of_row(activations, row, len(rows[index].target) if window else None)
            found[index] = normed(hidden, epsilon), keys
        on_progress(Event(stage, len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def _of_row(activations: Activations, index: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Hidden states and keys of one row of a batch: its first ``count`` columns, or all that are no padding."""
    non_padding = activations.batch.mask[index].bool() if count is None else slice(count)
    return activations.hidden[index, non_padding].float().cpu(), activations.keys[index, non_padding].float().cpu()


def normed(states: Tensor, epsilon: float) -> Tensor:
    """Return states (..., d) as a decoder block's own norm of weight 1 gives them."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
