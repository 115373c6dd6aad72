"""A memory's router, fitted: what is learned once a base model, and each edit's own relation, subject and places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.edit_states import ReadTexts, read_texts
from wisecli.export.stock.router.answer_places import Elsewhere, GoingOn, answer_places, begun_answers, prompts_ends
from wisecli.export.stock.router.answer_values import answer_values
from wisecli.export.stock.router.reader_training import relation_reader
from wisecli.export.stock.router.relation_reader import RelationReader
from wisecli.export.stock.router.router_blocks import Router, Scales
from wisecli.export.stock.router.separation import Separation
from wisecli.export.stock.router.subject_detectors import name_states, subject_detectors
from wisecli.export.stock.text_states import Rotation, StateCapture, TextStates, rotation_of
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.progress import ProgressCallback

# Log odds that an edit without a subject has to be surer by.
_SURER = 3.0
# Log odds by which an edit's own prompts open it at least, unless that takes more than so many off the threshold.
_SPARE, _LOWER = 1.0, 4.0
# Relations of one subject are much the same from this cosine on; log odds by which the other's prompts close an edit
# then, and what the length of the direction costs. The threshold of an edit for which another stands.
_SIMILAR, _CONFLICT, _RIDGE, _NEVER = 0.7, 10.0, 1.0, 100.0
# Texts whose relations are read side by side.
_TOGETHER = 32


def fitted_router(
    loaded: Loaded, manifest: Manifest, identity: BaseIdentity, share: float, on_progress: ProgressCallback
) -> Router:
    """Return the router of a memory.

    Args:
        identity: of the base model.
        share: how much of the packaged text is read.
    """
    site, edits = manifest.site, manifest.edits
    capture = StateCapture(loaded, site, on_progress)
    reader = relation_reader(capture, identity, share=share)
    names = name_states(capture, identity.exact, share=share)
    read = read_texts(capture, manifest)
    detectors = subject_detectors(capture, edits, names, read)
    asked = own_questions(loaded, site, reader, read)
    stands = one_of_each_fact(asked, detectors.subject, edits)
    asked, read = asked.standing_for(stands), read.standing_for(stands)
    relations, least = edit_relations(reader, asked, len(edits))
    usual = reader.threshold.detach() + torch.where(detectors.subject < 0, _SURER, 0.0)
    thresholds = usual.minimum((least - _SPARE).maximum(usual - _LOWER)).where(least < torch.inf, _NEVER)
    relations, thresholds = told_apart(reader, asked, relations, thresholds, detectors.subject)
    # Of the same tokens as those that are read behind the last layer.
    begins, elsewhere = read.answers(read.at_router), Elsewhere(names.others[-len(names.last) :], names.sinks)
    going_on = GoingOn(begun_answers(begins, len(edits), elsewhere), prompts_ends(begins, elsewhere))
    scales = Scales(1 / float(reader.gain), float(read.last.inverse.median()), rotation_of(loaded, site, 1).scaling)
    answers = read.answers(read.last)
    # As long as states are there: about three times what any answer takes.
    added = answer_values(loaded, site, answers.then) * (math.sqrt(site.d) / scales.last)
    places = answer_places(answers, Elsewhere(names.last, names.last_sinks), added, len(edits))
    return Router(reader, relations, thresholds, detectors, going_on, places, scales)


@dataclass(frozen=True)
class OwnQuestions:
    """What a reader makes of edits' own prompts in trained forms: ``codes`` (n, c) of the relation, how much each
    ``asks`` (n,), and the ``edit`` (n,) that it is of.
    """

    codes: Tensor
    asks: Tensor
    edit: Tensor

    def standing_for(self, edits: Sequence[int]) -> OwnQuestions:
        """Return the prompts with those of each edit as another's, as those of :meth:`ReadTexts.standing_for`."""
        return replace(self, edit=torch.tensor(edits)[self.edit])

    def means(self, edits: int) -> Tensor:
        """Return the mean code of each edit (e, c), of length 1; 0 for those without texts."""
        return F.normalize(torch.zeros(edits, self.codes.shape[1]).index_add(0, self.edit, self.codes), dim=-1)


@torch.no_grad()
def own_questions(loaded: Loaded, site: Site, reader: RelationReader, read: ReadTexts) -> OwnQuestions:
    """Return what a reader makes of edits' own prompts."""
    own = torch.tensor([number for number, text in enumerate(read.texts) if text.own])
    lengths = torch.tensor([len(text.row.prompt) for text in read.texts])
    rotation = rotation_of(loaded, site, int(lengths.max()))
    parts = [read_ends(reader, read.at_router, texts, lengths[texts], rotation) for texts in own.split(_TOGETHER)]
    codes, asks = (torch.cat(part) for part in zip(*parts, strict=True))
    return OwnQuestions(codes, asks, torch.tensor([text.edit for text in read.texts])[own])


def one_of_each_fact(asked: OwnQuestions, subject: Tensor, edits: Sequence[Edit]) -> list[int]:
    """Return for each edit the last one (e,) with the same answer to much the same relation of the same subject."""
    stands = list(range(len(edits)))
    for number, alike in sorted(_alike(asked.means(len(edits)), subject).items(), reverse=True):
        same = [other for other in alike if other > number and edits[other].answer == edits[number].answer]
        stands[number] = stands[same[-1]] if same else number
    return stands


def edit_relations(reader: RelationReader, asked: OwnQuestions, edits: int) -> tuple[Tensor, Tensor]:
    """Return the code of each edit's relation (e, c), and the least log odds (e,), without a threshold, by which one of
    its own prompts asks it.
    """
    relations = asked.means(edits)
    odds = reader.kappa.detach() * (asked.codes * relations[asked.edit]).sum(1) + asked.asks
    return relations, torch.full((edits,), torch.inf).scatter_reduce(0, asked.edit, odds, "amin")


def told_apart(
    reader: RelationReader, asked: OwnQuestions, relations: Tensor, thresholds: Tensor, subject: Tensor
) -> tuple[Tensor, Tensor]:
    """Return relations (e, c) and thresholds (e,) of edits that close where an own prompt of another is asked, if both
    ask much the same of one subject (e,) and have different answers.
    """
    relations, thresholds, kappa = relations.clone(), thresholds.clone(), float(reader.kappa.detach())
    for edit, alike in _alike(relations, subject).items():
        own, others = (asked.codes[torch.isin(asked.edit, torch.tensor(some))] for some in ([edit], alike))
        direction, offset = Separation(own, torch.zeros(len(own), dtype=torch.long), others, _RIDGE).solved()
        relations[edit] += _CONFLICT / kappa * direction[0]
        thresholds[edit] += _CONFLICT * (1 - offset[0])
    return relations, thresholds


def _alike(relations: Tensor, subject: Tensor) -> dict[int, list[int]]:
    """Return for each edit, of which others ask much the same relation of the same subject, those others, ascending."""
    found: dict[int, list[int]] = {}
    for one in (torch.bincount(subject[subject >= 0]) > 1).nonzero()[:, 0].tolist():
        edits = (subject == one).nonzero()[:, 0]
        similar = (relations[edits] @ relations[edits].T > _SIMILAR).fill_diagonal_(False)
        found |= {int(edit): edits[row].tolist() for edit, row in zip(edits, similar, strict=True) if row.any()}
    return found


def read_ends(
    reader: RelationReader, states: TextStates, texts: Tensor, lengths: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Return codes (B, c) of texts, by number (B,), cut to ``lengths`` (B,) tokens, and whether they ask (B,)."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return reader.pooled(reader.token_features(*states.packed(texts, mask)), mask, lengths - 1, rotation)
