"""States that leave the router's layer and the last one, at texts that edits answer and in answers; each is read once.

A stock checkpoint reads the RMS-normed state ``u`` behind both. It depends on the text alone, as nothing below is
edited, so what is to be told apart can be captured from the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.export.stock.subject_texts import name_of, own_texts, texts_on_subject
from wisecli.export.stock.text_states import StateCapture, TextStates, last_site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, row_of
from wisecli.models.running.generation import end_token
from wisecli.models.running.quick_products import quick_products

# Forms whose states are read in the model's own type; the others say what else may come near.
_EXACT = ("bare", "chat")
# So many tokens before a prompt's last one tell what is no answer yet.
_ASKING = 12


class EditText(NamedTuple):
    """A text that an edit answers, with the answer, and the number of the edit.

    ``own`` texts are its prompt in some form, others are on its subject; ``exact`` ones are read in the model's type.
    """

    row: Row
    edit: int
    own: bool
    exact: bool


class Next(NamedTuple):
    """What comes next in an answer: a ``token``, or where it is erased any but those ``unwanted``."""

    token: int
    unwanted: tuple[int, ...] | None


class _Place(NamedTuple):
    """What is left to say of an edit's answer, whether that is all of it, and what comes ``then``."""

    edit: int
    begins: bool
    left: tuple[int, ...]
    then: Next


@dataclass(frozen=True)
class EditStates:
    """Normed states (n, d) behind a layer at which edits are to be answered, and the ``key`` (n,) that each is to open.

    A key stands for what is left to say of one edit's answer: ``edits`` (K,) are the edits' numbers, ``inside`` (K,)
    says whether some of the answer was said before, ``spaced`` (K,) whether what is left begins with a blank, ``then``
    is what comes next. ``asking`` (m, d) are states inside the texts that edits answer, and ``asking_edit`` (m,) is
    whose.
    """

    states: Tensor
    key: Tensor
    edits: Tensor
    inside: Tensor
    spaced: Tensor
    then: tuple[Next, ...]
    asking: Tensor
    asking_edit: Tensor


@dataclass(frozen=True)
class ReadTexts:
    """Texts that edits answer, the states of their prompts' and answers' tokens ``at_router``, behind its layer, and
    behind the ``last``; ``spaced`` are answers' tokens that begin with a blank.
    """

    texts: tuple[EditText, ...]
    at_router: TextStates
    last: TextStates
    spaced: frozenset[int]

    def numbers(self) -> dict[tuple[int, ...], int]:
        """Return each text's number, by its prompt's tokens."""
        return {text.row.prompt: number for number, text in enumerate(self.texts)}

    def standing_for(self, edits: Sequence[int]) -> ReadTexts:
        """Return the texts with each edit's number replaced by that of the edit that stands for its fact."""
        return replace(self, texts=tuple(text._replace(edit=edits[text.edit]) for text in self.texts))

    def answers(self, behind: TextStates) -> EditStates:
        """Return the states at which edits are to be answered, behind one of both layers."""
        keys: dict[_Place, int] = {}
        key, at, asking, asking_edit = list[int](), list[int](), list[int](), list[int]()
        for text, begin in zip(self.texts, behind.first.tolist(), strict=False):
            key += [keys.setdefault(place, len(keys)) for place in _places(text)]
            last = begin + len(text.row.prompt) - 1
            at += range(last, last + len(text.row.target))
            asking += range(max(begin + 1, last - _ASKING), last)
            asking_edit += [text.edit] * (len(asking) - len(asking_edit))
        of_keys = [(place.edit, not place.begins, place.then.token in self.spaced) for place in keys]
        edits, inside, spaced = (torch.tensor(column) for column in zip(*of_keys, strict=True))
        states, prompts = (behind.normed[rows].float() for rows in (at, asking))
        then = tuple(place.then for place in keys)
        return EditStates(states, torch.tensor(key), edits, inside, spaced, then, prompts, torch.tensor(asking_edit))


def read_texts(capture: StateCapture, manifest: Manifest) -> ReadTexts:
    """Return the texts that edits answer, their prompts in trained forms and texts on their subjects, with states."""
    loaded, site = capture.loaded, capture.site
    texts = _texts(loaded, manifest)
    tokens = [[*text.row.prompt, *text.row.target[:-1]] for text in texts]
    at_router, last = (TextStates.empty(tokens, site.d) for _ in range(2))
    for exact in (True, False):
        chosen = [number for number, text in enumerate(texts) if text.exact == exact]
        with nullcontext() if exact else quick_products(loaded, last_site(loaded, site)):
            capture.put_both(at_router, last, tokens, chosen, "edits")
    said = {token for text in texts for token in text.row.target}
    spaced = {token for token in said if str(loaded.tokenizer.decode([token]))[:1].isspace()}
    return ReadTexts(tuple(texts), at_router, last, frozenset(spaced))


def _places(text: EditText) -> list[_Place]:
    """Return the places of an answer, one for each of its tokens."""
    target, unwanted = text.row.target, text.row.unwanted
    then = [Next(token, unwanted[index] if unwanted else None) for index, token in enumerate(target)]
    return [_Place(text.edit, index == 0, target[index:], each) for index, each in enumerate(then)]


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
    for number in sorted({text.edit for text in found.values()}):
        edit, name = manifest.edits[number], name_of(manifest.edits[number])
        for text in texts_on_subject(tokenizer, name) if name else ():
            if text not in found:
                row = row_of(tokenizer, text, edit.answer, erased=edit.erased, end=end)
                found[text] = EditText(row, number, False, False)
    return list(found.values())
