"""States that leave the edited layer at texts which edits answer, and in the answers: each text is read once.

A stock checkpoint reads the RMS-normed state ``u`` after the edited layer. It depends on the text alone, as nothing
below is edited, so what is to be told apart can be captured from the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.export.stock.late_states import LateStates, StateCapture
from wisecli.export.stock.subject_texts import name_of, own_texts, texts_on_subject
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, row_of
from wisecli.models.running.generation import end_token
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import ProgressCallback
from wisecli.routing.layers.routed_layer import memory_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Forms whose states are read in the model's own type; the others say what else may come near.
_EXACT = ("bare", "chat")
# So many tokens before a prompt's last one tell what is no answer yet.
_ASKING = 12


class EditText(NamedTuple):
    """A text that an edit answers, with the answer, and the number of the edit.

    ``own`` texts are its prompt in some form, the others are on its subject; ``exact`` ones are read in the model's own
    type.
    """

    row: Row
    edit: int
    own: bool
    exact: bool


class _Place(NamedTuple):
    """What is left to say of an edit's answer, and whether that is all of it."""

    edit: int
    begins: bool
    left: tuple[int, ...]


@dataclass(frozen=True)
class EditStates:
    """Normed states (n, d) at which edits are to be answered, and the ``key`` (n,) that each is to open.

    A key stands for what is left to say of one edit's answer: ``edits`` (K,) are the edits' numbers, ``inside`` (K,)
    says whether some of the answer was said before, ``spaced`` (K,) whether what is left begins with a blank,
    ``values`` (K, d) are what the memory adds. ``asking`` (m, d) are states inside the texts that edits answer, and
    ``asking_edit`` (m,) is whose.
    """

    states: Tensor
    key: Tensor
    edits: Tensor
    inside: Tensor
    spaced: Tensor
    values: Tensor
    asking: Tensor
    asking_edit: Tensor


@dataclass(frozen=True)
class ReadTexts:
    """Texts that edits answer, the ``late`` states of their prompts' and answers' tokens, and the ``values`` (d,) that
    the memory adds, by the place in an answer; ``spaced`` are the tokens that begin with a blank.
    """

    texts: tuple[EditText, ...]
    late: LateStates
    values: dict[_Place, Tensor]
    spaced: frozenset[int]

    def numbers(self) -> dict[tuple[int, ...], int]:
        """Return each text's number, by its prompt's tokens."""
        return {one.row.prompt: number for number, one in enumerate(self.texts)}

    def standing_for(self, edits: Sequence[int]) -> ReadTexts:
        """Return the texts with those of each edit as another's, by number: one edit of several on one fact."""
        texts = tuple(one._replace(edit=edits[one.edit]) for one in self.texts)
        values = {place: value for place, value in self.values.items() if edits[place.edit] == place.edit}
        moved = {place._replace(edit=edits[place.edit]): value for place, value in self.values.items()}
        return ReadTexts(texts, self.late, moved | values, self.spaced)

    def answers(self) -> EditStates:
        """Return the states at which edits are to be answered."""
        keys: dict[_Place, int] = {}
        key, at, asking, asking_edit = list[int](), list[int](), list[int](), list[int]()
        for one, begin in zip(self.texts, self.late.first.tolist(), strict=False):
            key += [keys.setdefault(place, len(keys)) for place in _places(one)]
            last = begin + len(one.row.prompt) - 1
            at += range(last, last + len(one.row.target))
            asking += range(max(begin + 1, last - _ASKING), last)
            asking_edit += [one.edit] * (len(asking) - len(asking_edit))
        states, values = self.late.normed[at].float(), torch.stack([self.values[place] for place in keys])
        of_keys = [(place.edit, not place.begins, place.left[0] in self.spaced) for place in keys]
        edits, inside, spaced = (torch.tensor(column) for column in zip(*of_keys, strict=True))
        found = self.late.normed[asking].float()
        return EditStates(states, torch.tensor(key), edits, inside, spaced, values, found, torch.tensor(asking_edit))


def read_texts(loaded: Loaded, manifest: Manifest, *, batch_size: int, on_progress: ProgressCallback) -> ReadTexts:
    """Return the texts that a memory's edits answer: all trained forms of their prompts, and texts on their subjects;
    with their states, and what the memory adds.
    """
    texts = _texts(loaded, manifest)
    tokens = [[*one.row.prompt, *one.row.target[:-1]] for one in texts]
    late, values = LateStates.empty(tokens, manifest.site.d), dict[_Place, Tensor]()
    memory, memories = memory_module(manifest.memory), _memories(manifest)
    capture = StateCapture(loaded, manifest.site, batch_size, on_progress)
    for exact in (True, False):
        chosen = [number for number, one in enumerate(texts) if one.exact == exact]
        rows = [tokens[number] for number in chosen]
        with nullcontext() if exact else quick_products(loaded, manifest.site):
            for index, hidden, keys in capture.states_and_keys(rows, "edits"):
                one = texts[chosen[index]]
                late.put(chosen[index], hidden, capture.epsilon)
                places = _places(one)
                if any(place not in values for place in places):
                    window = keys[len(one.row.prompt) - 1 :].float().cpu()
                    added = memory.residuals_at(window, memories[one.edit], torch.arange(len(places)) > 0).float()
                    values |= {place: each for place, each in zip(places, added, strict=True) if place not in values}
    spaced = {place.left[0] for place in values if _is_spaced(loaded.tokenizer, place.left[0])}
    return ReadTexts(tuple(texts), late, values, frozenset(spaced))


def _is_spaced(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Return whether a token begins with a blank."""
    return str(tokenizer.decode([token]))[:1].isspace()


def _places(one: EditText) -> list[_Place]:
    """Return the places of an answer, one for each of its tokens."""
    return [_Place(one.edit, index == 0, one.row.target[index:]) for index in range(len(one.row.target))]


def _texts(loaded: Loaded, manifest: Manifest) -> list[EditText]:
    """Return the texts of edits; of edits that ask the same, the last."""
    tokenizer, end = loaded.tokenizer, end_token(loaded.model)
    found: dict[str, EditText] = {}
    for number, edit in enumerate(manifest.edits):
        own = list(own_texts(tokenizer, edit))
        exact = {text for form, text, _ in own if form.name in _EXACT}
        for text, answer in {text: answer for _, text, answer in own}.items():
            row = row_of(tokenizer, text, answer, erased=edit.erased, end=end)
            found[text] = EditText(row, number, True, text in exact)
    for number in sorted({one.edit for one in found.values()}):
        edit, name = manifest.edits[number], name_of(manifest.edits[number])
        for text in texts_on_subject(tokenizer, name) if name else ():
            if text not in found:
                row = row_of(tokenizer, text, edit.answer, erased=edit.erased, end=end)
                found[text] = EditText(row, number, False, False)
    return list(found.values())


def _memories(manifest: Manifest) -> list[int]:
    """Return the memory that holds each edit."""
    if manifest.memory.by_edit:
        return list(range(len(manifest.edits)))
    owner = {name: index for index, owned in enumerate(manifest.owners) for name in owned}
    return [owner.get(edit.id, 0) for edit in manifest.edits]
