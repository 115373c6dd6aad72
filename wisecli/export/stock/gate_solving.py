"""Directions and offsets that tell each key's own states from all others, solved key by key.

Each key has a convex problem of its own: squared hinge losses, its own states to 1 and others to stay below 0, and a
ridge on its direction. Few of the others ever matter, so a key is solved on its *working set*, those that come nearest,
by Newton's method with an exact line search; then all others are read again, and those that came too near join the set.
A direction is a sum of states, so a step solves a system as large as the number of states that matter to the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Keys that are solved side by side, and others that each is solved against at a time.
_TOGETHER, _WORKING_SET = 128, 384
# How often all states are read at most, and how near others outside of the working set may come.
_ROUNDS, _TOLERANCE = 8, 1e-3
# Newton's steps on a working set at most, and halvings of one.
_STEPS, _HALVINGS = 40, 25


@dataclass(frozen=True)
class Separation:
    """What is to be told apart: ``states`` (n, d) of keys, the ``key`` (n,) of each, and ``others`` (m, d).

    ``ridge`` weighs the length of directions and ``negative`` each state that a key must not open for, beside the mean
    loss of its own; those are to stay below minus the ``margin``.
    """

    states: Tensor
    key: Tensor
    others: Tensor
    ridge: float
    negative: float
    margin: float

    def solved(self) -> tuple[Tensor, Tensor]:
        """Return directions (K, d) and offsets (K,)."""
        every = torch.cat([self.states, self.others])
        owner = torch.cat([self.key, self.key.new_full((len(self.others),), -1)])
        parts = torch.arange(int(self.key.max()) + 1).split(_TOGETHER)
        found = [self._part(part, every, owner) for part in parts]
        return torch.cat([directions for directions, _ in found]), torch.cat([offsets for _, offsets in found])

    def _part(self, part: Tensor, every: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Directions and offsets of some keys (k,), against all states (N, d) by the key that each belongs to (N,)."""
        own, weights = self._own(part)
        means = (every[own] * weights[..., None]).sum(1)
        line = _Line(means / means.square().sum(1, keepdim=True).clamp(min=1e-6), torch.zeros(len(part)))
        size = min(_WORKING_SET, len(every) - own.shape[1])
        own_states = owner == part[:, None]
        weights = torch.cat([weights, torch.full((len(part), size), self.negative)], 1)
        targets = torch.cat([torch.ones(own.shape), torch.full((len(part), size), -self.margin)], 1)
        nearest: Tensor | None = None
        for _ in range(_ROUNDS):
            readings = line.readings(every).masked_fill_(own_states, -torch.inf)
            if nearest is not None:
                matters = readings.gather(1, nearest) > -self.margin
                readings.scatter_(1, nearest, torch.where(matters, torch.inf, -torch.inf))
                outside = readings.where(readings < torch.inf, -torch.inf)
                if bool((outside <= _TOLERANCE - self.margin).all()):
                    break
            nearest = readings.topk(size, 1).indices
            chosen = every[torch.cat([own, nearest], 1)]
            line = _solved(line, _Sets(chosen, targets, weights, own.shape[1], self.ridge))
        return line.directions, line.offsets

    def _own(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Which states are each key's (k, c), and how much each counts (k, c): 0 where a key has fewer."""
        order = self.key.argsort(stable=True)
        counts = torch.bincount(self.key)
        first = (counts.cumsum(0) - counts)[part]
        counts = counts[part]
        column = torch.arange(int(counts.max()))
        there = column < counts[:, None]
        own = order[(first[:, None] + column).where(there, first[:, None])]
        return own, there / counts[:, None]


class _Line(NamedTuple):
    """Directions (k, d) and offsets (k,)."""

    directions: Tensor
    offsets: Tensor

    def readings(self, states: Tensor) -> Tensor:
        """What is read of states (N, d), or of each key's own (k, p, d)."""
        if states.dim() == 2:
            return torch.addmm(self.offsets[:, None], self.directions, states.T)
        return torch.baddbmm(self.offsets[:, None, None], states, self.directions[..., None])[..., 0]


class _Sets(NamedTuple):
    """Each key's states (k, p, d), what they should read at least or at most (k, p), and how much each counts (k, p);
    the first ``own`` are the key's own.
    """

    states: Tensor
    targets: Tensor
    weights: Tensor
    own: int
    ridge: float

    def missed(self, readings: Tensor) -> Tensor:
        """By how much readings (k, p) miss what they should be: above 0 of a key's own, below 0 of others."""
        missing = self.targets - readings
        return torch.cat([missing[:, : self.own].clamp(min=0), missing[:, self.own :].clamp(max=0)], 1)


def _solved(line: _Line, sets: _Sets) -> _Line:
    """Return where Newton's method ends on working sets, from a line on."""
    readings = line.readings(sets.states)
    for _ in range(_STEPS):
        matters = (sets.missed(readings) != 0) & (sets.weights > 0)
        goal = _least_squares(sets, matters)
        aimed = goal.readings(sets.states)
        if torch.equal((sets.missed(aimed) != 0) & (sets.weights > 0), matters):
            return goal
        step = _step(line, goal, readings, aimed, sets)
        line = _Line(
            *(
                one + step[:, None] * (other - one) if one.dim() == 2 else one + step * (other - one)
                for one, other in zip(line, goal, strict=True)
            )
        )
        readings = readings + step[:, None] * (aimed - readings)
    return line


def _least_squares(sets: _Sets, matters: Tensor) -> _Line:
    """Return the line that is best if just those states (k, p) matter, whichever side of their target they are on."""
    count = int(matters.sum(1).max())
    index = matters.float().topk(count, 1).indices
    there = matters.gather(1, index)
    states = sets.states.gather(1, index[..., None].expand(-1, -1, sets.states.shape[-1])) * there[..., None]
    weights = sets.weights.gather(1, index)
    system = states.new_zeros(len(index), count + 1, count + 1)
    system[:, :count, :count] = states @ states.mT
    system[:, range(count), range(count)] += torch.where(there, sets.ridge / weights, 1.0)
    system[:, :count, count] = system[:, count, :count] = there.float()
    # A key that nothing matters to keeps an offset of 0.
    system[:, count, count] = (~there.any(1)).float()
    right = torch.cat([sets.targets.gather(1, index) * there, states.new_zeros(len(index), 1)], 1)
    found = torch.linalg.solve(system.double(), right.double()).float()
    return _Line((found[:, None, :count] @ states)[:, 0], found[:, count])


def _step(line: _Line, goal: _Line, readings: Tensor, aimed: Tensor, sets: _Sets) -> Tensor:
    """Return how far to go from a line to a goal (k,) for the least loss, by halving: from 0 to 1."""
    ahead = goal.directions - line.directions
    change = aimed - readings

    def rises(step: Tensor) -> Tensor:
        missed = sets.missed(readings + step[:, None] * change)
        ridge = ((line.directions + step[:, None] * ahead) * ahead).sum(1)
        return sets.ridge * ridge > (sets.weights * missed * change).sum(1)

    low, high = torch.zeros(len(readings)), torch.ones(len(readings))
    if bool((~rises(high)).all()):
        return high
    low = torch.where(rises(high), low, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        high = torch.where(up := rises(middle), middle, high)
        low = torch.where(up, low, middle)
    return low
