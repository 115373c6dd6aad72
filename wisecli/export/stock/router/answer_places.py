"""Places in answers: once an edit is open, which of its residuals the stream gets at a token.

An edit's *first* residual, that of the commonest beginning of its answer, is added wherever the edit is open and the
token is at none of its other places. Those - other tokens of the answer, and beginnings that are written otherwise, as
without the blank before - are told from the edit's other states by a direction each, and from its first ones by one for
them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.export.stock.edit_states import EditStates
from wisecli.export.stock.router.separation import Separation, from_group_means, inverse_root

# How much the length of directions costs; by how much less than nothing it reads outside answers whether a token is
# inside one.
_RIDGE, _DEPTH = 0.01, 0.2
# By how much less than nothing first places read at tokens that attention rests on; what others read there at most.
_SHUT, _NEARLY = 1.0, 0.1


@dataclass(frozen=True)
class AnswerPlaces:
    """Places (p,): the ``edit`` of each, ``directions`` (p, d) and ``offsets`` (p,) that read 1 there and 0 or less at
    the edit's other states, and the residual that is ``added`` to the stream (p, d).

    ``inside`` (e, d + 1) reads 1 at any place of an edit's answer before which some of it was said, and 0 or little
    less where it begins and outside of answers; its last column is the offset.
    """

    edit: Tensor
    directions: Tensor
    offsets: Tensor
    added: Tensor
    inside: Tensor


def answer_places(states: EditStates, edits: int, elsewhere: Tensor, sinks: Tensor) -> AnswerPlaces:
    """Return the places of a memory's edits.

    Args:
        edits: how many edits there are, with those that later ones asking the same stand for.
        elsewhere: states (m, d) that are inside no answer.
        sinks: states (k, d) of tokens that attention rests on; no place is there.
    """
    strayed = from_group_means(states.states, states.key)
    turn = inverse_root(strayed.T @ strayed / len(strayed))
    # From planes of whitened states to those of states.
    back = torch.block_diag(turn.T, torch.ones(1, 1))
    outside, at_sinks = elsewhere @ turn, sinks @ turn
    whitened, owner = states.states @ turn, states.edits[states.key]
    directions, offsets = torch.zeros_like(states.values), torch.ones(len(states.edits))
    inside = torch.zeros(edits, states.states.shape[1] + 1)
    counts = torch.bincount(states.key, minlength=len(states.edits))
    is_first = torch.zeros(len(states.edits), dtype=torch.bool)
    for edit in states.edits.unique().tolist():
        keys = (states.edits == edit).nonzero()[:, 0]
        begins = keys[~states.inside[keys]]
        first = begins[counts[begins].argmax()]
        is_first[first] = True
        others, own = keys[keys != first], (owner == edit).nonzero()[:, 0]
        if not len(others):
            continue
        key, rows = states.key[own], whitened[own]
        within, at = rows[key != first], torch.cat([rows[key == first], at_sinks])
        local = torch.full((len(states.edits),), -1).scatter(0, others, torch.arange(len(others)))
        planes, constants = Separation(within, local[key[key != first]], at, _RIDGE).solved()
        directions[others], offsets[others] = planes @ turn.T, constants
        shut = _told_from(within, torch.cat([at, outside])) @ back
        directions[first], offsets[first] = -shut[:-1], 1 - shut[-1]
        said = states.inside[key]
        if said.any():
            inside[edit] = _told_from(rows[said], torch.cat([rows[~said], at_sinks, outside])) @ back
    found = AnswerPlaces(states.edits, directions, offsets, states.values, inside)
    return _closed_at(sinks, found, is_first, torch.cat([elsewhere, states.states])) if len(sinks) else found


def _told_from(states: Tensor, others: Tensor) -> Tensor:
    """Return a plane (d + 1,) that reads 1 at states (n, d), and 0 or little less at others (m, d); its last number is
    the offset.
    """
    key = torch.zeros(len(states), dtype=torch.long)
    plane, constant = Separation(states, key, others, _RIDGE, depth=_DEPTH).solved()
    return torch.cat([plane[0], constant])


def _closed_at(sinks: Tensor, found: AnswerPlaces, is_first: Tensor, others: Tensor) -> AnswerPlaces:
    """Return places that are closed at sinks (k, d), and much the same at all other states (m, d).

    The norm of sinks is so large that extra channels read as nought there: nothing else would keep places closed. No
    more is taken away than must be, as an answer's own tokens may be half a sink: a blank behind a question is.
    """
    plane, constant = _apart(sinks, others)
    read = (sinks @ found.directions.T + found.offsets).amax(0)
    less = torch.where(is_first, read.clamp(min=0) + _SHUT, (read - _NEARLY).clamp(min=0))
    begun = (sinks @ found.inside[:, :-1].T + found.inside[:, -1]).amax(0).clamp(min=0) + _SHUT
    return replace(
        found,
        directions=found.directions - less[:, None] * plane,
        offsets=found.offsets - less * constant,
        inside=found.inside - begun[:, None] * torch.cat([plane, constant[None]]),
    )


def _apart(sinks: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return a direction (d,) and an offset that read 1 at sinks (k, d) and about 0 at all other states (m, d), as
    Fisher's linear discriminant does.
    """
    mean = others.mean(0)
    spread = ((others - mean).T @ (others - mean)).double() / len(others)
    spread += spread.diagonal().mean() * torch.eye(len(spread))
    away = (sinks.mean(0) - mean).double()
    direction = torch.linalg.solve(spread, away)
    direction = (direction / (direction @ away)).float()
    return direction, -(direction @ mean)
