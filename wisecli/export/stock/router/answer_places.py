"""Places in answers: once an edit is open, which of its residuals the stream gets at a token.

An edit's *first* residual, that of its answer as most answers begin, is added wherever the edit is open and the token
is at none of its other places. Those are other tokens of the answer, told from the edit's other states by a direction
each; and where an answer begins the *other* way, as without the blank before, which one direction tells for all edits:
how an answer begins depends on what a prompt ends in, not on the edit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.export.stock.edit_states import EditStates
from wisecli.export.stock.router.separation import Separation, from_group_means, inverse_root

# How much the length of directions costs, of those that tell places of an edit apart and of planes by least squares.
_RIDGE, _PLANE_RIDGE = 0.01, 1e-3
# By how much less than nothing first places read at tokens that attention rests on; what others read there at most.
_SHUT, _NEARLY = 1.0, 0.1


@dataclass(frozen=True)
class AnswerPlaces:
    """Places (p,): the ``edit`` of each, ``directions`` (p, d) and ``offsets`` (p,) that read 1 there and 0 or less at
    the edit's other states, and the residual that is ``added`` to the stream (p, d).

    ``inside`` (e, d + 1) reads about 1 at any place of an edit's answer before which some of it was said, and about 0
    where it begins, in prompts and elsewhere; its last column is the offset.
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
    white = replace(states, states=states.states @ turn, asking=states.asking @ turn)
    said, ways = states.inside[states.key], _ways_to_begin(states)
    unsaid = _moment(elsewhere @ turn) + _moment(sinks @ turn) + _moment(white.asking)
    first, other = (white.states[way[states.key]] for way in ways)
    all_said = _sums(white.states[said])
    otherwise = _plane(other, unsaid + _moment(first) + _mean(all_said))
    unsaid += _moment(white.states[~said])
    planes, inside = (torch.zeros(count, len(unsaid)) for count in (len(states.edits), edits))
    planes[:, -1] = 1
    planes[ways.other] = otherwise
    for edit in states.edits.unique().tolist():
        mine = states.edits == edit
        said_by_others = _mean(all_said - _sums(white.states[said & mine[states.key]]))
        inside[edit], shut = _going_on(white, ways, edit, unsaid + said_by_others)
        planes[mine & ways.first] -= shut + otherwise * bool((mine & ways.other).any())
        others = (mine & ~ways.first & ~ways.other).nonzero()[:, 0]
        if len(others):
            planes[others] = _told_apart(white, others, sinks @ turn)
    # From planes of whitened states to those of states.
    back = torch.block_diag(turn.T, torch.ones(1, 1))
    planes = planes @ back
    found = AnswerPlaces(states.edits, planes[:, :-1], planes[:, -1], states.values, inside @ back)
    return _closed_at(sinks, found, ways.first, torch.cat([elsewhere, states.states])) if len(sinks) else found


def _going_on(states: EditStates, ways: _Ways, edit: int, unsaid: Tensor) -> tuple[Tensor, Tensor]:
    """Return a plane (d + 1,) that reads 1 where some of an edit's answer was said, and one that does so at all places
    but for its first and the one begun the other way; both read 0 in its prompts and where the moment ``unsaid``
    (d + 1, d + 1) is from.
    """
    mine = states.edits[states.key] == edit
    key, rows = states.key[mine], states.states[mine]
    said, usual = states.inside[key], (ways.first | ways.other)[key]
    unsaid = unsaid + _moment(states.asking[states.asking_edit == edit])
    inside = _plane(rows[said], unsaid + _moment(rows[~said]))
    # Few edits have further beginnings, as in other languages.
    further = not torch.equal(said, ~usual)
    return inside, _plane(rows[~usual], unsaid + _moment(rows[usual])) if further else inside


def _told_apart(states: EditStates, places: Tensor, sinks: Tensor) -> Tensor:
    """Return a plane (n, d + 1) for each of some places (n,) of an edit, that reads 1 there and 0 or less at all its
    other places and at sinks (k, d).
    """
    number = torch.full((len(states.edits),), -1).scatter(0, places, torch.arange(len(places)))
    own = (states.edits[states.key] == states.edits[places[0]]).nonzero()[:, 0]
    key, rows = number[states.key[own]], states.states[own]
    there = key >= 0
    directions, offsets = Separation(rows[there], key[there], torch.cat([rows[~there], sinks]), _RIDGE).solved()
    return torch.cat([directions, offsets[:, None]], 1)


class _Ways(NamedTuple):
    """Which places (p,) are edits' ``first``, and which are the same answers begun the ``other`` way: without a blank
    where most begin with one, or the other way round.
    """

    first: Tensor
    other: Tensor


def _ways_to_begin(states: EditStates) -> _Ways:
    begins, counts = ~states.inside, torch.bincount(states.key, minlength=len(states.edits))
    usual = states.spaced == ((counts * begins)[states.spaced].sum() * 2 >= (counts * begins).sum())
    first, other = torch.zeros_like(begins), torch.zeros_like(begins)
    for edit in states.edits.unique().tolist():
        keys = ((states.edits == edit) & begins).nonzero()[:, 0]
        mine, rare = keys[usual[keys]], keys[~usual[keys]]
        first[_commonest(mine if len(mine) else rare, counts)] = True
        if len(mine) and len(rare):
            other[_commonest(rare, counts)] = True
    return _Ways(first, other)


def _commonest(keys: Tensor, counts: Tensor) -> Tensor:
    return keys[counts[keys].argmax()]


def _plane(states: Tensor, others: Tensor) -> Tensor:
    """Return the plane (d + 1,) that reads 1 at states (n, d) and 0 where the moments of ``others`` (d + 1, d + 1) are
    from, by ridge least squares; its last number is the offset. It reads 0 if there are no states.
    """
    sums = _sums(states)
    moment = others + _mean(sums)
    moment[:-1, :-1].diagonal().add_(_PLANE_RIDGE)
    plane: Tensor = torch.linalg.solve(moment.double(), _mean(sums)[-1].double()).float()
    return plane


def _sums(states: Tensor) -> Tensor:
    """Return what states (n, d), each with a 1 behind, add to a second moment (d + 1, d + 1); its last number is n."""
    padded = F.pad(states, (0, 1), value=1.0)
    return padded.T @ padded


def _mean(sums: Tensor) -> Tensor:
    """Return the second moment that sums are of, or 0 if they are of no states."""
    return sums / sums[-1, -1].clamp(min=1)


def _moment(states: Tensor) -> Tensor:
    """Return the second moment (d + 1, d + 1) of states (n, d) with a 1 behind; so groups of states count alike."""
    return _mean(_sums(states))


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
