"""States that leave the edited layer at edits' prompts and in their answers, and what the memory adds there.

A stock checkpoint reads the RMS-normed state ``u`` after the edited layer. It depends on the text alone, as nothing
below is edited, so what is to be told apart can be captured from the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import Row, collate, in_batches, row_of
from wisecli.models.running.activations import captured
from wisecli.models.running.generation import end_token
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.layers.routed_layer import memory_module

# Forms whose states are read in the model's own type; the others say what else may come near.
_EXACT = ("bare", "chat")


@dataclass(frozen=True)
class EditStates:
    """Normed states (n, d) at which edits are to be answered, and the ``key`` (n,) that each is to open.

    A key stands for what is left to say of one edit's answer: ``edits`` (K,) are the edits' numbers, ``inside`` (K,)
    says whether some of the answer was said before, ``values`` (K, d) are what the memory adds.
    """

    states: Tensor
    key: Tensor
    edits: Tensor
    inside: Tensor
    values: Tensor


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
    states, added = torch.cat([hidden for hidden, _ in read]), torch.stack([values[each] for each in places])
    return EditStates(states, torch.tensor(key), edits, within, added)


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
            read = _read_states(loaded, site, rows, batch_size=batch_size, on_progress=on_progress)
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


def _read_states(
    loaded: Loaded, site: Site, rows: Sequence[Row], *, batch_size: int, on_progress: ProgressCallback
) -> list[tuple[Tensor, Tensor]]:
    """Return normed states that leave the edited layer (n, d), and the site's keys (n, width), of each row: at its
    prompt's last token and every target token but the last.
    """
    epsilon = float(loaded.model.config.rms_norm_eps)
    groups = list(in_batches(rows, batch_size, by_beginning=True))
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    read = captured(loaded.model, site, batches, stream=loaded.stream, above=False, window=True, shared=True)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, activations in zip(groups, read, strict=True):
        for row, index in enumerate(indices):
            own = (row, slice(len(rows[index].target)))
            hidden, keys = (part[own].float().cpu() for part in (activations.hidden, activations.keys))
            found[index] = _normed(hidden, epsilon), keys
        on_progress(Event("edits", len(found), len(rows)))
    return [found[index] for index in range(len(rows))]


def _normed(states: Tensor, epsilon: float) -> Tensor:
    """Return states (..., d) as a decoder block's own norm of weight 1 gives them."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
