"""A memory's router, fitted: what is learned once a base model, and each edit's own relation, subject and places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.edit_states import EditStates, edit_states
from wisecli.export.stock.router.answer_places import answer_places
from wisecli.export.stock.router.late_states import LateStates, late_states, rotation_of
from wisecli.export.stock.router.reader_training import relation_reader
from wisecli.export.stock.router.relation_reader import RelationReader, Rotation
from wisecli.export.stock.router.router_blocks import Router
from wisecli.export.stock.router.subject_detectors import name_states, subject_detectors
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import ProgressCallback

# Log odds that an edit without a subject has to be surer by.
_SURER = 3.0
# Log odds by which an edit's own prompts open it at least, unless that takes more than so many off the threshold.
_SPARE, _LOWER = 1.0, 4.0
# States of unrelated tokens that answers are told from.
_ELSEWHERE = 4000


def fitted_router(
    loaded: Loaded, manifest: Manifest, identity: str, share: float, *, batch_size: int, on_progress: ProgressCallback
) -> Router:
    """Return the router of a memory.

    Args:
        identity: of the base model, for the cache.
        share: how much of the packaged text is read.
    """
    site, edits = manifest.site, manifest.edits
    reader = relation_reader(loaded, site, identity, share=share, batch_size=batch_size, on_progress=on_progress)
    named: dict[str, Any] = {"batch_size": batch_size, "on_progress": on_progress}
    names = name_states(loaded, site, identity, share=share, **named)
    states = edit_states(loaded, manifest, **named)
    detectors = subject_detectors(loaded, site, edits, names, _inside_answers(states, edits), **named)
    relations, least = edit_relations(loaded, site, reader, edits, **named)
    places = answer_places(states, len(edits), names.others[-_ELSEWHERE:], names.sinks)
    usual = reader.threshold.detach() + torch.where(detectors.subject < 0, _SURER, 0.0)
    thresholds = usual.minimum((least - _SPARE).maximum(usual - _LOWER))
    inverse, scaling = 1 / float(reader.gain), rotation_of(loaded, site, 1).scaling
    return Router(reader, relations, thresholds, detectors, places, inverse, scaling)


def _inside_answers(states: EditStates, edits: Sequence[Edit]) -> Tensor:
    """Return states (m, d) inside the answers of edits, but for answers that name a subject."""
    names = {name.casefold() for edit in edits if (name := edit.subject_name)}
    free = torch.tensor([not any(name in edit.answer.casefold() for name in names) for edit in edits])
    return states.states[(states.inside & free[states.edits])[states.key]]


@torch.no_grad()
def edit_relations(
    loaded: Loaded,
    site: Site,
    reader: RelationReader,
    edits: Sequence[Edit],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
) -> tuple[Tensor, Tensor]:
    """Return the code of each edit's relation (e, c), of length 1: the mean over its own prompts in trained forms; and
    the least log odds (e,), without a threshold, by which one of them asks it.
    """
    tokenizer, forms = loaded.tokenizer, usable_forms(loaded.tokenizer, trained=True)
    own = [(number, [edit.prompt, *(one.prompt for one in edit.translations)]) for number, edit in enumerate(edits)]
    asked = [(number, form.render(tokenizer, text)) for number, texts in own for text in texts for form in forms]
    tokens = [tokenizer(text)["input_ids"] for _, text in asked]
    with quick_products(loaded, site):
        read = late_states(loaded, site, tokens, batch_size=batch_size, on_progress=on_progress, stage="edits")
    rotation, number = rotation_of(loaded, site, max(map(len, tokens))), torch.tensor([one for one, _ in asked])
    parts = [read_ends(reader, read, rows, rotation) for rows in torch.arange(len(tokens)).split(batch_size)]
    codes, asks = (torch.cat(part) for part in zip(*parts, strict=True))
    relations = F.normalize(torch.zeros(len(edits), codes.shape[1]).index_add(0, number, codes), dim=-1)
    odds = reader.kappa * (codes * relations[number]).sum(1) + asks
    return relations, torch.full((len(edits),), torch.inf).scatter_reduce(0, number, odds, "amin")


def read_ends(reader: RelationReader, read: LateStates, texts: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Return the codes (B, c) of texts, by number (B,), at their last tokens, and whether they ask anything (B,)."""
    lengths = read.first[texts + 1] - read.first[texts]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return reader.pooled(reader.token_features(*read.packed(texts, mask)), mask, lengths - 1, rotation)
