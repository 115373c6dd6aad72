"""Places in answers: once an edit is open, which of its answer's tokens comes next.

An edit's *first* token, that of its answer as most answers begin, comes next wherever the edit is open and the token
is at none of its other places. Those are other tokens of the answer, told from the edit's other states by a direction
each; and where an answer begins the *other* way, as without the blank before, which one direction tells for all edits:
how an answer begins depends on what a prompt ends in, not on the edit. Places are read behind the last layer, and
whether an answer was *begun*, which keeps its edit open, behind the router's layer.
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
    the edit's other states, and what is ``added`` to the stream (p, d).
    """

    edit: Tensor
    directions: Tensor
    offsets: Tensor
    added: Tensor


@dataclass(frozen=True)
class GoingOn:
    """Planes, whose last number is the offset, that read behind the router's layer whether an answer goes on or begins.

    ``begun`` (e, d + 1) reads about 1 at any place of an edit's answer before which some of it was said, and about 0
    where it begins, in prompts and elsewhere; ``ends`` (d + 1,) about 1 where any answer begins, and 0 elsewhere.
    """

    begun: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Elsewhere:
    """States behind a layer that are inside no answer: of ``others`` (m, d), and of ``sinks`` (k, d), tokens that
    attention rests on.
    """

    others: Tensor
    sinks: Tensor


def answer_places(states: EditStates, elsewhere: Elsewhere, added: Tensor, edits: int) -> AnswerPlaces:
    """Return the places of a memory's edits, by states behind the last layer.

    Args:
        added: what each key adds (K, d).
        edits: how many edits there are, with those that later ones asking the same stand for.
    """
    ways, read = _ways_to_begin(states), _Read.of(states, elsewhere)
    first, other = (read.states.states[way[states.key]] for way in ways)
    shut = read.planes(~(ways.first | ways.other), edits)
    otherwise = _plane(other, read.prompts + _moment(first) + _mean(read.said_by_all))
    planes = torch.zeros(len(states.edits), shut.shape[1])
    planes[:, -1] = 1
    planes[ways.other] = otherwise
    for edit in states.edits.unique().tolist():
        mine = states.edits == edit
        planes[mine & ways.first] -= shut[edit] + otherwise * bool((mine & ways.other).any())
        others = (mine & ~ways.first & ~ways.other).nonzero()[:, 0]
        if len(others):
            planes[others] = _told_apart(read.states, others, read.sinks)
    planes = planes @ read.back
    planes = _closed_at(elsewhere, states.states, planes, ways.first)
    return AnswerPlaces(states.edits, planes[:, :-1], planes[:, -1], added)


def prompts_ends(states: EditStates, elsewhere: Elsewhere) -> Tensor:
    """Return a plane (d + 1,) that reads 1 where answers begin and about 0 elsewhere, behind the router's layer."""
    return _plane(states.states[~states.inside[states.key]], _moment(elsewhere.others) + _moment(elsewhere.sinks))


def begun_answers(states: EditStates, edits: int, elsewhere: Elsewhere) -> Tensor:
    """Return planes (e, d + 1) that read about 1 where some of an edit's answer was said, by states behind the
    router's layer; for ``edits`` edits, with those that later ones asking the same stand for.
    """
    read = _Read.of(states, elsewhere)
    planes = read.planes(states.inside, edits) @ read.back
    return _closed_at(elsewhere, states.states, planes, torch.ones(edits, dtype=torch.bool))


@dataclass(frozen=True)
class _Read:
    """Whitened ``states`` and ``sinks``, what takes planes (d + 1,) of them ``back`` to those of states, and moments
    (d + 1, d + 1): of ``prompts`` and what is elsewhere, and the sums of all places where some of an answer was said.
    """

    states: EditStates
    sinks: Tensor
    back: Tensor
    prompts: Tensor
    said_by_all: Tensor

    @classmethod
    def of(cls, states: EditStates, elsewhere: Elsewhere) -> _Read:
        """Return states whitened by how far those at one place are apart."""
        strayed = from_group_means(states.states, states.key)
        turn = inverse_root(strayed.T @ strayed / len(strayed))
        white = replace(states, states=states.states @ turn, asking=states.asking @ turn)
        others, sinks = elsewhere.others @ turn, elsewhere.sinks @ turn
        prompts = _moment(others) + _moment(sinks) + _moment(white.asking)
        back = torch.block_diag(turn.T, torch.ones(1, 1))
        return cls(white, sinks, back, prompts, _sums(white.states[states.inside[states.key]]))

    def planes(self, chosen: Tensor, edits: int) -> Tensor:
        """Return a plane for each edit (e, d + 1) that reads 1 at its ``chosen`` (K,) places, and 0 at its others, in
        prompts, elsewhere and where some of another answer was said.
        """
        states, found = self.states, torch.zeros(edits, len(self.back))
        said = states.inside[states.key]
        unsaid = self.prompts + _moment(states.states[~said])
        of_text = states.edits[states.key]
        for edit in states.edits.unique().tolist():
            mine = of_text == edit
            rows, at = states.states[mine], chosen[states.key[mine]]
            by_others = _mean(self.said_by_all - _sums(states.states[said & mine]))
            asking = _moment(states.asking[states.asking_edit == edit])
            found[edit] = _plane(rows[at], unsaid + by_others + asking + _moment(rows[~at]))
        return found


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
    """Mark each edit's commonest first token, and its commonest in the other spelling, with or without a space."""
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


def _closed_at(elsewhere: Elsewhere, states: Tensor, planes: Tensor, wholly: Tensor) -> Tensor:
    """Return planes (n, d + 1) that are closed at sinks, and read much the same at others and at states (m, d).

    The norm of sinks is so large that extra channels read as zero there: nothing else would keep planes closed. No
    more is taken away than must be, as an answer's own tokens may be half a sink: a blank after a question is.

    Args:
        wholly: which planes (n,) are to read less than nothing there; others nearly nothing.
    """
    if not len(elsewhere.sinks):
        return planes
    plane, constant = _apart(elsewhere.sinks, torch.cat([elsewhere.others, states]))
    read = (elsewhere.sinks @ planes[:, :-1].T + planes[:, -1]).amax(0)
    less = torch.where(wholly, read.clamp(min=0) + _SHUT, (read - _NEARLY).clamp(min=0))
    return planes - less[:, None] * torch.cat([plane, constant[None]])


def _apart(sinks: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return Fisher's discriminant, a direction (d,) and an offset: 1 at sinks (k, d), about 0 at others (m, d)."""
    mean = others.mean(0)
    spread = ((others - mean).T @ (others - mean)).double() / len(others)
    spread += spread.diagonal().mean() * torch.eye(len(spread))
    away = (sinks.mean(0) - mean).double()
    direction = torch.linalg.solve(spread, away)
    direction = (direction / (direction @ away)).float()
    return direction, -(direction @ mean)
