"""A memory's router, fitted: what is learned once a base model, and each edit's own relation, subject and places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.export.stock.edit_states import ReadTexts, read_texts
from wisecli.export.stock.late_states import LateStates, Rotation, rotation_of
from wisecli.export.stock.router.answer_places import answer_places
from wisecli.export.stock.router.reader_training import relation_reader
from wisecli.export.stock.router.relation_reader import RelationReader
from wisecli.export.stock.router.router_blocks import Router
from wisecli.export.stock.router.subject_detectors import name_states, subject_detectors
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.progress import ProgressCallback

# Log odds that an edit without a subject has to be surer by.
_SURER = 3.0
# Log odds by which an edit's own prompts open it at least, unless that takes more than so many off the threshold.
_SPARE, _LOWER = 1.0, 4.0
# States of unrelated tokens that answers are told from.
_ELSEWHERE = 4000
# Texts whose relations are read side by side.
_TOGETHER = 32


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
    read = read_texts(loaded, manifest, **named)
    detectors = subject_detectors(loaded, site, edits, names, read, **named)
    relations, least = edit_relations(loaded, site, reader, read, len(edits))
    places = answer_places(read.answers(), len(edits), names.others[-_ELSEWHERE:], names.sinks)
    usual = reader.threshold.detach() + torch.where(detectors.subject < 0, _SURER, 0.0)
    thresholds = usual.minimum((least - _SPARE).maximum(usual - _LOWER))
    inverse, scaling = 1 / float(reader.gain), rotation_of(loaded, site, 1).scaling
    return Router(reader, relations, thresholds, detectors, places, inverse, scaling)


@torch.no_grad()
def edit_relations(
    loaded: Loaded, site: Site, reader: RelationReader, read: ReadTexts, edits: int
) -> tuple[Tensor, Tensor]:
    """Return the code of each edit's relation (e, c), of length 1: the mean over its own prompts in trained forms; and
    the least log odds (e,), without a threshold, by which one of them asks it.
    """
    own = torch.tensor([number for number, one in enumerate(read.texts) if one.own])
    lengths = torch.tensor([len(one.row.prompt) for one in read.texts])
    number, rotation = (
        torch.tensor([read.texts[one].edit for one in own]),
        rotation_of(loaded, site, int(lengths.max())),
    )
    parts = [read_ends(reader, read.late, texts, lengths[texts], rotation) for texts in own.split(_TOGETHER)]
    codes, asks = (torch.cat(part) for part in zip(*parts, strict=True))
    relations = F.normalize(torch.zeros(edits, codes.shape[1]).index_add(0, number, codes), dim=-1)
    odds = reader.kappa * (codes * relations[number]).sum(1) + asks
    return relations, torch.full((edits,), torch.inf).scatter_reduce(0, number, odds, "amin")


def read_ends(
    reader: RelationReader, late: LateStates, texts: Tensor, lengths: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Return the codes (B, c) of texts, by number (B,), behind as many tokens as ``lengths`` (B,) say, and whether they
    ask anything (B,).
    """
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return reader.pooled(reader.token_features(*late.packed(texts, mask)), mask, lengths - 1, rotation)
