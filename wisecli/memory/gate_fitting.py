"""A memory's gate, fitted: for each of its keys a direction and an offset that tell its states from all others.

States are whitened by what unrelated text and a change of wording alone do to them. There each key begins as the linear
discriminant of its states, and is trained against those states of other keys and of unrelated text that come nearest:
squared hinge losses, its own states to 1 and others to 0, and a ridge that keeps directions short and so the gate open
for rewordings it has not seen. Its threshold stands so far above 0 that no state it was fitted to comes near.
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
    even spread does. ``ridge`` and ``negative`` weigh the length of directions and states that a key must not open for,
    beside the mean loss of its own. A key opens at ``threshold`` by half, from nothing to all within ``ramp``.
    """

    wording: float = 4.0
    shrinkage: float = 0.1
    ridge: float = 0.01
    negative: float = 1.0
    margin: float = 0.0
    threshold: float = 0.5
    ramp: float = 0.2
    steps: int = 40
    mined: int = 2000
    together: int = 256


def fit_gate(own: OwnStates, background: Background, settings: GateSettings = GateSettings()) -> Gate:
    """The gate of a memory, in float32."""
    mean = background.unrelated.mean(0)
    turn = _whitening(background, mean, settings)
    states, unrelated = (own.states - mean) @ turn, (torch.cat([background.unrelated, own.others]) - mean) @ turn
    parts = [
        _fit(part, states, own.key, unrelated, settings)
        for part in torch.arange(len(own.values)).split(settings.together)
    ]
    whitened, offsets = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    directions = whitened @ turn.T
    offsets = offsets - directions @ mean
    steep = WIDTH / settings.ramp
    return Gate(directions * steep, (offsets - settings.threshold) * steep + WIDTH / 2, own.values)


def _whitening(background: Background, mean: Tensor, settings: GateSettings) -> Tensor:
    """The root (d, d) of the inverse of how states spread."""
    spread = _evened(background.unrelated - mean) + settings.wording * _evened(background.strayed)
    values, vectors = torch.linalg.eigh(spread.double())
    values = values + settings.shrinkage * values.mean()
    return ((vectors * values.rsqrt()) @ vectors.T).float()


def _evened(rows: Tensor) -> Tensor:
    """The second moment (d, d) of rows (n, d), with 1 as its mean eigenvalue."""
    moment = rows.T @ rows
    return moment * (len(moment) / moment.trace().clamp(min=1e-12))


def _fit(part: Tensor, states: Tensor, key: Tensor, unrelated: Tensor, settings: GateSettings) -> tuple[Tensor, Tensor]:
    """Directions (k, d) and offsets (k,) of some of the keys, by their numbers (k,)."""
    place = torch.full((int(key.max()) + 1,), -1)
    place[part] = torch.arange(len(part))
    mine = place[key] >= 0
    owner = place[key]
    count = torch.bincount(owner[mine], minlength=len(part)).float()
    means = torch.zeros(len(part), states.shape[1]).index_add(0, owner[mine], states[mine]) / count[:, None]
    directions = means / means.square().sum(1, keepdim=True).clamp(min=1e-6)
    offsets = torch.zeros(len(part))
    for _ in range(2):
        nearest = (unrelated @ directions.T + offsets).amax(1).topk(min(settings.mined, len(unrelated))).indices
        directions, offsets = _trained(
            directions, offsets, torch.cat([states, unrelated[nearest]]), owner, count, settings
        )
    return directions, offsets


def _trained(
    directions: Tensor, offsets: Tensor, states: Tensor, owner: Tensor, count: Tensor, settings: GateSettings
) -> tuple[Tensor, Tensor]:
    """Directions and offsets after some steps; the first states are those of ``owner`` (n,), -1 for other keys."""
    rows = (owner >= 0).nonzero().flatten()
    columns = owner[rows]
    weights = 1 / count[columns]
    with torch.enable_grad():
        turned = directions.clone().requires_grad_()
        moved = offsets.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [turned, moved], max_iter=settings.steps, history_size=8, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = states @ turned.T + moved
            own = scores[rows, columns]
            wrong = (scores + settings.margin).clamp(min=0).square()
            total = (weights * (1 - own).clamp(min=0).square()).sum()
            total = total + settings.negative * (wrong.sum() - wrong[rows, columns].sum())
            total = total + settings.ridge * turned.square().sum()
            total.backward()
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return turned.detach(), moved.detach()
