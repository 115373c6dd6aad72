"""Texts → what an early layer makes of the tokens by which it is known what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.shard import FIRST_TOKEN_FORM, GATE_FORM, JUDGED_FORM, PromptStates, half
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import special_ids
from wisecli.models.prompts.prompt_forms import Form, forms
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.activations import captured
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.deciding.late_interaction import compared_tokens, earlier_turn_tokens, starts_with_word
from wisecli.routing.deciding.prompt_window import window_of, window_size

# The forms that an edit's own prompt is kept in: in small letters a name is other tokens, and at the very beginning.
_KEPT = ("bare", "lower case", "led in")
# In capitals it is other tokens altogether. There is no such form among those that an edited model is measured in.
_CAPITALS = Form("capitals", change="upper")


@dataclass(frozen=True)
class TokenStates:
    """States (n, d) of the tokens of B texts that are compared, text after text, in half precision.

    ``text`` (n,) says which text each is of, ``position`` (n,) which of its tokens, ``token`` (n,) its number in the
    vocabulary, and ``in_earlier_turn`` (n,) whether that is of a turn before the last one. ``first_state`` (B, d) are
    the states of texts' first tokens, which are compared with nothing; ``first_token`` (B,) are those, and
    ``first_is_word`` (B,) says whether they are words.
    """

    states: Tensor
    text: Tensor
    position: Tensor
    token: Tensor
    in_earlier_turn: Tensor
    first_state: Tensor
    first_token: Tensor
    first_is_word: Tensor


class ReadChunk(NamedTuple):
    """Some of many texts, by their numbers, ascending, and what left the router's layer and a deep gate's, if there is
    one.
    """

    numbers: list[int]
    router: TokenStates
    gate: TokenStates | None


class ReadSites(NamedTuple):
    """The layers whose states are read: the router's, and a deep gate's if there is one between that and the edited."""

    router: Site
    gate: Site | None


def read_sites(loaded: Loaded, site: Site) -> ReadSites:
    """Return the layers whose states are read, which are below the edited one, or of two layers the first.

    Raises:
        SettingsError: the first layer is edited.
    """
    layers = list(loaded.model.get_submodule(site.layer_module.rpartition(".")[0]).children())
    router = site.router_layer(len(layers))
    if router < 0:
        raise SettingsError("a lookup reads a layer below the edited one; give --layer 1 or more, or writer=gradient")
    # Text may pass over layers of another sort than the edited one, as over those that read images.
    usable = [
        layer
        for layer in range(router + 1, site.gate_layer(len(layers)) + 1)
        if type(layers[layer]) is type(layers[site.layer])
    ]
    return ReadSites(site.below(router), site.below(usable[-1]) if usable else None)


def special_tokens(loaded: Loaded) -> Tensor:
    """Return the tokenizer's special tokens (b,), ascending; if there are none, a number that no token has."""
    return torch.tensor(special_ids(loaded.tokenizer) or [len(loaded.tokenizer)])


def token_states(
    loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, on_progress: ProgressCallback, stage: str
) -> TokenStates:
    """Return what leaves the layer of a site at the tokens of texts by which it is known what they ask, in their
    windows.
    """
    reading = _Reading(loaded, texts, [False] * len(texts))
    ((_, (found,)),) = reading.chunks([site], batch_size, len(texts), partial(_note, on_progress, stage, len(texts)))
    return found


def both_states(
    loaded: Loaded,
    sites: ReadSites,
    texts: Sequence[str],
    *,
    turns: Sequence[bool],
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
    at_a_time: int,
) -> Iterator[ReadChunk]:
    """Yield what :func:`token_states` returns of the router's layer, and of the gate's if that is another; read in one
    pass over all texts, of which some are held at a time.

    Args:
        turns: of which texts a user's turns before the last one are looked at, too.
        at_a_time: how many texts are held, at the least.
    """
    layers = [site for site in sites if site is not None]
    reading = _Reading(loaded, texts, turns)
    note = partial(_note, on_progress, stage, len(texts))
    for numbers, (router, *gate) in reading.chunks(layers, batch_size, at_a_time, note):
        yield ReadChunk(numbers, router, gate[0] if gate else None)


def _note(on_progress: ProgressCallback, stage: str, total: int, done: int) -> None:
    on_progress(Event(stage, done, total))


class _Reading:
    """Texts that are being read, in one or two layers."""

    def __init__(self, loaded: Loaded, texts: Sequence[str], turns: Sequence[bool]) -> None:
        self._loaded, self._turns = loaded, turns
        self._tokens = [loaded.tokenizer(text)["input_ids"] for text in texts]
        size = window_size(loaded.model.config)
        self._rows = [Row(tuple(window_of(one, size)), ()) for one in self._tokens]
        self._breaks = special_tokens(loaded).to(loaded.device)
        self._found: dict[int, _ReadText] = {}

    def chunks(
        self, layers: Sequence[Site], batch_size: int, at_a_time: int, note: Callable[[int], None]
    ) -> Iterator[tuple[list[int], list[TokenStates]]]:
        """Yield numbers of texts and what left each layer, once for so many texts; those that begin alike are read
        together.

        Args:
            layers: one or two, the lower one first.
            note: is told how many texts are read.
        """
        loaded, rows, done = self._loaded, self._rows, 0
        *lower, site = layers
        groups = list(in_batches(rows, batch_size, by_beginning=True, padded=False))
        batches = (collate([rows[index] for index in group]).to(loaded.device) for group in groups)
        below = lower[0].layer_module if lower else None
        found = captured(loaded.model, site, batches, stream=loaded.stream, above=False, shared=True, lower=below)
        for group, one in zip(groups, found, strict=True):
            self._add(group, one.batch, [one.hidden] if one.lower is None else [one.lower, one.hidden])
            done += len(group)
            note(done)
            if len(self._found) >= at_a_time or done == len(rows):
                numbers = sorted(self._found)
                yield numbers, self._taken(numbers, len(layers))

    def _add(self, texts: Sequence[int], batch: Batch, layers: Sequence[Tensor]) -> None:
        """Keep the compared tokens of a batch of texts, by their numbers, with what left each layer (B, T, d)."""
        non_padding = batch.mask.bool()
        place = non_padding.long().cumsum(1) - 1
        last = compared_tokens(batch.ids, non_padding, place == 0, self._breaks)
        with_turns = torch.tensor([self._turns[index] for index in texts], device=last.device)
        before = torch.zeros_like(last)
        if with_turns.any():
            before = earlier_turn_tokens(batch.ids, non_padding, last, self._breaks) & with_turns[:, None]
        compared = last | before
        opens = starts_with_word(batch.ids, non_padding, compared, self._breaks).tolist()
        first = non_padding.int().argmax(1).tolist()
        for row, index in enumerate(texts):
            own = compared[row]
            # Of a long text the window leaves out tokens behind the first, which is not compared.
            places = place[row, own].cpu() + len(self._tokens[index]) - len(self._rows[index].prompt)
            self._found[index] = _ReadText(
                [half(layer[row, own]).cpu() for layer in layers],
                [half(layer[row, first[row]]).cpu() for layer in layers],
                places,
                batch.ids[row, own].cpu(),
                before[row, own].cpu(),
                opens[row],
            )

    def _taken(self, numbers: Sequence[int], layers: int) -> list[TokenStates]:
        """Return what was found of some texts in each of so many layers, and let go of what that is made from."""
        found = [self._found.pop(index) for index in numbers]
        return [
            TokenStates(
                states=torch.cat([one.states[layer] for one in found]),
                text=torch.arange(len(found)).repeat_interleave(torch.tensor([len(one.token) for one in found])),
                position=torch.cat([one.position for one in found]),
                token=torch.cat([one.token for one in found]),
                in_earlier_turn=torch.cat([one.in_earlier_turn for one in found]),
                first_state=torch.stack([one.first_state[layer] for one in found]),
                first_token=torch.tensor([self._rows[index].prompt[0] for index in numbers]),
                first_is_word=torch.tensor([one.first_is_word for one in found]),
            )
            for layer in range(layers)
        ]


class _ReadText(NamedTuple):
    """What was read of one text: of :class:`TokenStates`, the states of each layer."""

    states: list[Tensor]
    first_state: list[Tensor]
    position: Tensor
    token: Tensor
    in_earlier_turn: Tensor
    first_is_word: bool


def prompt_states(
    loaded: Loaded,
    sites: ReadSites,
    edits: Sequence[tuple[int, Edit]],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
) -> PromptStates:
    """Return the states of numbered edits' own prompts, in each of the ways that are kept: in the router's layer, and
    of the prompts that gates judge in the deep gate's layer, too.
    """
    kept = [one for number, edit in edits for one in _prompt_variants(loaded, number, edit)]
    read = partial(token_states, loaded, batch_size=batch_size, on_progress=on_progress, stage=stage)
    found = _prompt_states(loaded, kept, read(sites.router, [one.text for one in kept]))
    if sites.gate is None:
        return found
    judged = [one for one in kept if one.way == 0 or one.way >= len(_KEPT) + 1]
    again = _prompt_states(loaded, judged, read(sites.gate, [one.text for one in judged]))
    return PromptStates.joined([found, replace(again, form=again.form + GATE_FORM)])


def _prompt_states(loaded: Loaded, kept: Sequence[_PromptVariant], found: TokenStates) -> PromptStates:
    """Return what was found of the texts of prompts, their first tokens last."""
    pairs = list(zip(found.text.tolist(), found.position.tolist(), strict=True))
    subjects = [_tokens_of(loaded, one.subject, one.text) for one in kept]
    asked = [_tokens_of(loaded, one.prompt.rstrip("?"), one.text) for one in kept]
    subject = torch.tensor([place in subjects[text] for text, place in pairs])
    # What the form puts before a prompt asks nothing.
    own = torch.tensor([place >= min(asked[text], default=0) for text, place in pairs])
    numbers = torch.tensor([one.edit for one in kept])
    ways = torch.tensor([one.way for one in kept])
    words = PromptStates(found.states.float(), numbers[found.text], ways[found.text], subject, found.token).rows(own)
    opens = found.first_is_word.nonzero().flatten()
    no_subject, first_form = torch.zeros(len(opens), dtype=torch.bool), ways[opens] + FIRST_TOKEN_FORM
    first_states = found.first_state[opens].float()
    first = PromptStates(first_states, numbers[opens], first_form, no_subject, found.first_token[opens])
    return PromptStates.joined([words, first])


class _PromptVariant(NamedTuple):
    """A prompt of a numbered edit as it is kept, what is asked in it, and about whom; ``way`` tells an edit's apart."""

    edit: int
    way: int
    text: str
    prompt: str
    subject: str | None


def _prompt_variants(loaded: Loaded, number: int, edit: Edit) -> Iterator[_PromptVariant]:
    """Yield an edit's own prompt in all forms that are kept, in chat for gates alone, and in other languages."""
    kept = [*(forms()[name] for name in _KEPT), _CAPITALS]
    in_chat = [(JUDGED_FORM, forms()["chat"])] if loaded.tokenizer.chat_template else []
    for way, form in [*enumerate(kept), *in_chat]:
        text = form.render(loaded.tokenizer, edit.prompt)
        # What a vocabulary does not have in capitals is the same token for all edits.
        if form is not _CAPITALS or _known(loaded, text):
            yield _PromptVariant(number, way, text, edit.prompt, edit.subject_name)
    for way, one in enumerate(edit.translations, len(kept)):
        yield _PromptVariant(number, way, one.prompt, one.prompt, edit.subject_name)


def _known(loaded: Loaded, text: str) -> bool:
    """Return whether the tokenizer has tokens for all of a text."""
    unknown = loaded.tokenizer.unk_token_id
    special = loaded.tokenizer("", add_special_tokens=True)["input_ids"]
    return unknown is None or unknown in special or unknown not in loaded.tokenizer(text)["input_ids"]


def _tokens_of(loaded: Loaded, part: str | None, text: str) -> frozenset[int]:
    """Return the places of the tokens of a part of a text; none if it is not there, or the tokenizer cannot tell."""
    first = text.casefold().find(part.casefold()) if part else -1
    if first < 0 or part is None or not loaded.tokenizer.is_fast:
        return frozenset()
    last = first + len(part)
    spans = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return frozenset(place for place, (begin, end) in enumerate(spans) if begin < last and end > first)
