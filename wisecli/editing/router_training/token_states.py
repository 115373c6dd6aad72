"""Texts → what an early layer makes of the tokens by which it is known what is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.shard import FIRST_TOKEN_FORM, GATE_FORM, PromptStates, half
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import special_ids
from wisecli.models.prompts.prompt_forms import Form, forms
from wisecli.models.prompts.tokenization import Row, collate, in_batches
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


class ReadSites(NamedTuple):
    """The layers whose states are read: the router's, and the request gate's if that is another."""

    router: Site
    gate: Site | None


def read_sites(loaded: Loaded, site: Site) -> ReadSites:
    """Return the layers whose states are read, which are below the edited one, or of two layers the first.

    Raises:
        SettingsError: the first layer is edited.
    """
    layers = site.layer_module.rpartition(".")[0]
    depth = sum(1 for _ in loaded.model.get_submodule(layers).children())
    router, gate = site.router_layer(depth), site.gate_layer(depth)
    if router < 0:
        raise SettingsError("a lookup reads a layer below the edited one; give --layer 1 or more, or writer=gradient")
    return ReadSites(site.below(router), None if gate == router else site.below(gate))


def special_tokens(loaded: Loaded) -> Tensor:
    """Return the tokenizer's special tokens (b,), ascending; if there are none, a number that no token has."""
    return torch.tensor(special_ids(loaded.tokenizer) or [len(loaded.tokenizer)])


def token_states(
    loaded: Loaded,
    site: Site,
    texts: Sequence[str],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
    turns: bool = False,
) -> TokenStates:
    """Return what leaves the layer of a site at the tokens of texts by which it is known what they ask, in their
    windows.

    Args:
        turns: whether a user's turns before the last one are looked at, too.
    """
    tokens = [loaded.tokenizer(text)["input_ids"] for text in texts]
    size = window_size(loaded.model.config)
    rows = [Row(tuple(window_of(one, size)), ()) for one in tokens]
    groups = list(in_batches(rows, batch_size, by_beginning=True, padded=False))
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    found = [torch.empty(0)] * len(rows)
    places, ids = ([torch.empty(0, dtype=torch.long)] * len(rows) for _ in range(2))
    earlier = [torch.empty(0, dtype=torch.bool)] * len(rows)
    opening, opens = [torch.empty(0)] * len(rows), torch.zeros(len(rows), dtype=torch.bool)
    breaks, done = special_tokens(loaded).to(loaded.device), 0
    activations = captured(loaded.model, site, batches, stream=loaded.stream, above=False, shared=True)
    for indices, one in zip(groups, activations, strict=True):
        non_padding = one.batch.mask.bool()
        place = non_padding.long().cumsum(1) - 1
        last = compared_tokens(one.batch.ids, non_padding, place == 0, breaks)
        before = earlier_turn_tokens(one.batch.ids, non_padding, last, breaks) if turns else torch.zeros_like(last)
        compared = last | before
        opens[indices] = starts_with_word(one.batch.ids, non_padding, compared, breaks).cpu()
        first = one.hidden[torch.arange(len(non_padding), device=non_padding.device), non_padding.int().argmax(1)].cpu()
        for row, index in enumerate(indices):
            found[index] = half(one.hidden[row, compared[row]]).cpu()
            opening[index] = half(first[row])
            earlier[index], ids[index] = before[row, compared[row]].cpu(), one.batch.ids[row, compared[row]].cpu()
            # Of a long text the window leaves out tokens behind the first, which is not compared.
            places[index] = place[row, compared[row]].cpu() + len(tokens[index]) - len(rows[index].prompt)
        done += len(indices)
        on_progress(Event(stage, done, len(rows)))
    text = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(one) for one in found]))
    kept = torch.cat(found), text, torch.cat(places), torch.cat(ids), torch.cat(earlier)
    return TokenStates(*kept, torch.stack(opening), torch.tensor([row.prompt[0] for row in rows]), opens)


def prompt_states(
    loaded: Loaded,
    sites: ReadSites,
    edits: Sequence[tuple[int, Edit]],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
) -> PromptStates:
    """Return what the layers that are read make of the own prompts of numbered edits, in each of the ways that are
    kept; the gate's layer of those alone that it judges.
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
    """Yield an edit's own prompt in each of the forms that are kept, and its prompts in other languages as they are."""
    kept = [*(forms()[name] for name in _KEPT), _CAPITALS]
    for way, form in enumerate(kept):
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
