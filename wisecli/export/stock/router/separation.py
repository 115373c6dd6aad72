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

# Keys that are solved side by side.
_TOGETHER = 128
# Others that each key is solved against, each time that all states were read; how near those left out may come.
_SIZES, _TOLERANCE = (96, 192, *(256,) * 12), 1e-3
# Newton's steps on a working set at most, and halvings of one.
_STEPS, _HALVINGS = 40, 25
# A step that moves no score by more is the last.
_STILL = 1e-4


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
    negative: float = 1.0
    margin: float = 0.0

    def solved(self) -> tuple[Tensor, Tensor]:
        """Return directions (K, d) and offsets (K,)."""
        every = torch.cat([self.states, self.others])
        owner = torch.cat([self.key, self.key.new_full((len(self.others),), -1)])
        parts = torch.arange(int(self.key.max()) + 1).split(_TOGETHER)
        found = [self._part(part, every, owner) for part in parts]
        return torch.cat([directions for directions, _ in found]), torch.cat([offsets for _, offsets in found])

    def _part(self, part: Tensor, every: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the planes of some keys (k,), against all states (N, d) by the key that each belongs to (N,)."""
        own, weights = self._own(part)
        means = (every[own] * weights[..., None]).sum(1)
        planes = _Planes(means / means.square().sum(1, keepdim=True).clamp(min=1e-6), torch.zeros(len(part)))
        is_own = owner == part[:, None]
        nearest: Tensor | None = None
        for size in _SIZES:
            beyond = (planes.scores(every) + self.margin).masked_fill_(is_own, -torch.inf)
            if nearest is not None:
                inside = beyond.gather(1, nearest)
                if bool((beyond.scatter(1, nearest, -torch.inf) <= _TOLERANCE).all()):
                    break
                beyond.scatter_(1, nearest, inside.masked_fill(inside > 0, torch.inf))
            nearest = beyond.topk(min(size, len(every) - own.shape[1]), 1).indices
            planes = _solved(planes, self._sets(every, own, weights, nearest))
        return planes.directions, planes.offsets

    def _sets(self, every: Tensor, own: Tensor, weights: Tensor, nearest: Tensor) -> _Sets:
        """Return working sets of keys: their own states (k, c) with their weights, and others (k, p)."""
        states = every[torch.cat([own, nearest], 1)]
        weights = torch.cat([weights, torch.full(nearest.shape, self.negative)], 1)
        least = torch.cat([torch.ones(own.shape), torch.full(nearest.shape, -torch.inf)], 1)
        most = torch.cat([torch.full(own.shape, torch.inf), torch.full(nearest.shape, -self.margin)], 1)
        return _Sets(states, least, most, weights, self.ridge)

    def _own(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return which states are each key's (k, c), and how much each counts (k, c): 0 where a key has fewer."""
        order = self.key.argsort(stable=True)
        counts = torch.bincount(self.key)
        first = (counts.cumsum(0) - counts)[part]
        counts = counts[part]
        column = torch.arange(int(counts.max()))
        there = column < counts[:, None]
        own = order[(first[:, None] + column).where(there, first[:, None])]
        return own, there / counts[:, None]


class _Planes(NamedTuple):
    """Hyperplanes, one a key: directions (k, d) and offsets (k,)."""

    directions: Tensor
    offsets: Tensor

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores (k, N) of states (N, d), or (k, p) of each key's own (k, p, d)."""
        if states.dim() == 2:
            return torch.addmm(self.offsets[:, None], self.directions, states.T)
        return torch.baddbmm(self.offsets[:, None, None], states, self.directions[..., None])[..., 0]


class _Sets(NamedTuple):
    """Keys' states (k, p, d), their scores at ``least`` and at ``most`` (k, p), and how much each counts (k, p)."""

    states: Tensor
    least: Tensor
    most: Tensor
    weights: Tensor
    ridge: float

    def missed(self, scores: Tensor) -> Tensor:
        """Return what scores (k, p) lack to be where they should be: above 0 for those below, below 0 for others."""
        return scores.clamp(self.least, self.most) - scores

    def matters(self, scores: Tensor) -> Tensor:
        """Return which states (k, p) add to the loss."""
        return (self.missed(scores) != 0) & (self.weights > 0)

    def some(self, chosen: Tensor) -> _Sets:
        """Return the sets of some keys."""
        return _Sets(self.states[chosen], self.least[chosen], self.most[chosen], self.weights[chosen], self.ridge)


def _solved(planes: _Planes, sets: _Sets) -> _Planes:
    """Return the planes of least loss on working sets, by Newton's method from given planes."""
    directions, offsets = planes.directions.clone(), planes.offsets.clone()
    left = torch.arange(len(offsets))
    scores = planes.scores(sets.states)
    for _ in range(_STEPS):
        goal = _least_squares(sets, scores)
        aimed = goal.scores(sets.states)
        step = _step(planes, goal, scores, aimed, sets)[:, None]
        planes = _Planes(
            torch.lerp(planes.directions, goal.directions, step), torch.lerp(planes.offsets, goal.offsets, step[:, 0])
        )
        moved, scores = (step * (aimed - scores)).abs().amax(1), torch.lerp(scores, aimed, step)
        directions[left], offsets[left] = planes
        going_on = (moved > _STILL).nonzero().flatten()
        if not len(going_on):
            break
        if len(going_on) < len(left):
            left, scores = left[going_on], scores[going_on]
            planes, sets = _Planes(*(part[going_on] for part in planes)), sets.some(going_on)
    return _Planes(directions, offsets)


def _least_squares(sets: _Sets, scores: Tensor) -> _Planes:
    """Return the planes of least loss if just those states matter that do at scores (k, p), and are to score what they
    miss there.
    """
    matters, targets = sets.matters(scores), scores.clamp(sets.least, sets.most)
    count = int(matters.sum(1).max())
    index = matters.float().topk(count, 1).indices
    there = matters.gather(1, index)
    states = sets.states.gather(1, index[..., None].expand(-1, -1, sets.states.shape[-1])) * there[..., None]
    spare = torch.where(there, sets.ridge / sets.weights.gather(1, index), 1.0)
    system = (states @ states.mT + torch.diag_embed(spare)).double()
    right = torch.stack([targets.gather(1, index) * there, there.float()], -1).double()
    # By Cholesky and the offset by itself: torch's batched LU on several threads of a CPU is wrong, or never ends.
    scored, ones = torch.cholesky_solve(right, torch.linalg.cholesky(system)).unbind(-1)
    # A key that nothing matters to keeps an offset of 0.
    offsets = (scored.sum(1) / ones.sum(1).where(there.any(1), 1.0)).float()
    found = (scored - offsets[:, None] * ones).float()
    return _Planes((found[:, None] @ states)[:, 0], offsets)


def _step(planes: _Planes, goal: _Planes, scores: Tensor, aimed: Tensor, sets: _Sets) -> Tensor:
    """Return the step length from planes to a goal (k,) that lowers the loss most, by halving: from 0 to 1."""
    ahead = goal.directions - planes.directions
    change = aimed - scores

    def rises(step: Tensor) -> Tensor:
        missed = sets.missed(scores + step[:, None] * change)
        ridge = ((planes.directions + step[:, None] * ahead) * ahead).sum(1)
        return sets.ridge * ridge > (sets.weights * missed * change).sum(1)

    low, high = torch.zeros(len(scores)), torch.ones(len(scores))
    if bool((~rises(high)).all()):
        return high
    low = torch.where(rises(high), low, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        high = torch.where(up := rises(middle), middle, high)
        low = torch.where(up, low, middle)
    return low


def inverse_root(moment: Tensor) -> Tensor:
    """Return the inverse root (d, d) of a second moment (d, d) plus its mean eigenvalue: it whitens states."""
    values, vectors = torch.linalg.eigh(moment.double())
    root: Tensor = ((vectors * (values + values.mean()).rsqrt()) @ vectors.T).float()
    return root


def from_group_means(states: Tensor, group: Tensor) -> Tensor:
    """Return by how much states (n, d) differ from the means of the groups (n,) that they are of: (n, d)."""
    counts = torch.bincount(group).clamp(min=1)
    sums = torch.zeros(len(counts), states.shape[1]).index_add(0, group, states)
    return states - (sums / counts[:, None])[group]
