"""A memory's gate, fitted: for each of its keys a direction and an offset that tell its states from all others.

States are whitened by what unrelated text and a change of wording alone do to them. There each key is a support vector
machine with squared hinge: its own states are to give 1, and those of other keys, of unrelated text and of questions
nearby at most a number below 0. A ridge keeps directions short, and so the gate open for rewordings it has not seen. It
is solved by Newton's method in the dual, a small system for the states that count (Chapelle 2007, Training a support
vector machine in the primal).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.export.stock import WIDTH, Gate
from wisecli.memory.gate_states import Background, OwnStates


@dataclass(frozen=True)
class GateSettings:
    """How gates are fitted.

    ``wording`` is how much a change of wording counts beside the spread of unrelated text, ``shrinkage`` how much an
    even spread does. ``ridge`` weighs the length of directions and ``negative`` each state that a key must not open
    for, beside the mean loss of its own; those are to stay below minus the ``margin``. A key opens at ``threshold`` by
    half, from nothing to all within ``ramp``. Keys are fitted so many ``together``, against the ``mined`` states that
    come nearest to any of them; at most ``counting`` of them count for one key, in so many ``steps``.
    """

    wording: float = 4.0
    shrinkage: float = 0.1
    ridge: float = 0.1
    negative: float = 1.0
    margin: float = 0.3
    threshold: float = 0.5
    ramp: float = 0.2
    together: int = 256
    mined: int = 6000
    counting: int = 600
    steps: int = 6


def fit_gate(own: OwnStates, background: Background, settings: GateSettings = GateSettings()) -> Gate:
    """The gate of a memory, in float32."""
    mean = background.unrelated.mean(0)
    turn = _whitening(background, mean, settings)
    turn = turn / ((own.states - mean) @ turn).square().sum(1).mean().sqrt()
    states = (own.states - mean) @ turn
    others = (torch.cat([background.unrelated, own.others]) - mean) @ turn
    parts = torch.arange(len(own.values)).split(settings.together)
    fitted = [_fit(part, states, own.key, others, settings) for part in parts]
    directions = torch.cat([part[0] for part in fitted]) @ turn.T
    offsets = torch.cat([part[1] for part in fitted]) - directions @ mean
    steep = WIDTH / settings.ramp
    return Gate(directions * steep, (offsets - settings.threshold) * steep + WIDTH / 2, own.values)


def _whitening(background: Background, mean: Tensor, settings: GateSettings) -> Tensor:
    """The root (d, d) of the inverse of how states spread."""
    spread = _evened(background.unrelated - mean) + settings.wording * _evened(background.strayed)
    values, vectors = torch.linalg.eigh(spread.double())
    values = values + settings.shrinkage * values.mean()
    root: Tensor = ((vectors * values.rsqrt()) @ vectors.T).float()
    return root


def _evened(rows: Tensor) -> Tensor:
    """The second moment (d, d) of rows (n, d), with 1 as its mean eigenvalue."""
    moment = rows.T @ rows
    return moment * (len(moment) / moment.trace().clamp(min=1e-12))


def _fit(part: Tensor, states: Tensor, key: Tensor, others: Tensor, settings: GateSettings) -> tuple[Tensor, Tensor]:
    """Directions (k, d) and offsets (k,) of some of the keys, by their numbers (k,)."""
    mine = torch.isin(key, part)
    means = torch.stack([states[key == number].mean(0) for number in part.tolist()])
    against = torch.cat([states[~mine], others])
    near = (against @ means.T).amax(1).topk(min(settings.mined, len(against))).indices
    rows, owner = torch.cat([states[mine], against[near]]), key[mine]
    products = rows @ rows.T + 1  # the 1 is the offset's
    shares = [_solved((owner == number).nonzero().flatten(), products, settings) for number in part.tolist()]
    weights = torch.stack(shares)
    return weights @ rows, weights.sum(1)


def _solved(own: Tensor, products: Tensor, settings: GateSettings) -> Tensor:
    """What each state (n,) weighs in a key's direction, the key's ``own`` states by their places.

    Args:
        products: of all states with each other (n, n).
    """
    is_own = torch.zeros(len(products), dtype=torch.bool)
    is_own[own] = True
    target = torch.where(is_own, 1.0, -settings.margin)
    penalty = settings.ridge * torch.where(is_own, float(len(own)), 1 / settings.negative)
    counting = own
    weights = products.new_zeros(len(products))
    for _ in range(settings.steps):
        system = products[counting][:, counting] + penalty[counting].diag()
        solved = torch.linalg.solve(system, target[counting])
        weights = products.new_zeros(len(products)).index_copy(0, counting, solved)
        given = solved @ products[counting]
        worst = (given + settings.margin).masked_fill(is_own, torch.inf)
        chosen = worst.topk(min(len(own) + settings.counting, len(worst))).indices
        following = chosen[worst[chosen] > 0].sort().values
        if torch.equal(following, counting):
            break
        counting = following
    return weights
