"""A memory's gate, fitted: for each of its keys a direction and an offset that tell its states from all others.

States are whitened by what unrelated text and a change of wording alone do to them. There each key is told from the
states of other keys and those of unrelated text: squared hinge losses, its own states to 1 and others to stay below 0,
and a ridge that keeps directions short, and so the gate open for rewordings that it has not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.export.stock.gate_background import BackgroundStates
from wisecli.export.stock.gate_solving import Separation
from wisecli.export.stock.gate_states import EditStates
from wisecli.export.stock.stock_checkpoint import WIDTH, Gate
from wisecli.routing.memories.calibration import quantile


@dataclass(frozen=True)
class GateSettings:
    """How gates are fitted.

    ``wording`` is how much a change of wording counts beside the spread of unrelated text, ``shrinkage`` how much an
    even spread does. ``ridge`` weighs the length of directions and ``negative`` each state that a key must not open
    for, beside the mean loss of its own; those are to stay below minus the ``margin``.

    One stretch of unrelated states in so many is ``held_back`` and says where keys open: at prompts' ends and
    inside answers alike a share ``false_alarm`` of those states opens any key, as told by the share ``tail`` that comes
    nearest, and none below ``lowest``. For the sake of its own states one key may open lower than others by ``lower``.
    It opens by half there, from nothing to all within ``ramp``.
    """

    wording: float = 64.0
    shrinkage: float = 1.0
    ridge: float = 0.01
    negative: float = 1.0
    margin: float = 0.0
    held_back: int = 8
    stretch: int = 64
    false_alarm: float = 0.0005
    tail: float = 0.01
    lowest: float = 0.3
    lower: float = 0.25
    ramp: float = 0.1


def fit_gate(edit_states: EditStates, background: BackgroundStates, settings: GateSettings = GateSettings()) -> Gate:
    """Return the gate of a memory, in float32."""
    mean = background.unrelated.mean(0)
    turn = _whitening(background, mean, settings)
    stretch = torch.arange(len(background.unrelated)) // settings.stretch
    held_back = stretch % settings.held_back == settings.held_back - 1
    states = (edit_states.states - mean) @ turn
    others = (torch.cat([background.unrelated[~held_back], edit_states.others]) - mean) @ turn
    separation = Separation(states, edit_states.key, others, settings.ridge, settings.negative, settings.margin)
    directions, offsets = separation.solved()
    directions = directions @ turn.T
    offsets = offsets - directions @ mean
    thresholds = _thresholds(edit_states, directions, offsets, background.unrelated[held_back], settings)
    steep = WIDTH / settings.ramp
    return Gate(directions * steep, (offsets - thresholds) * steep + WIDTH / 2, edit_states.values)


def _thresholds(
    edit_states: EditStates, directions: Tensor, offsets: Tensor, unrelated: Tensor, settings: GateSettings
) -> Tensor:
    """Return where each key opens by half: (K,); lower, within bounds, where it would not be open at all of its own
    states.

    Args:
        unrelated: states (m, d) that nothing was fitted to.
    """
    thresholds = torch.full_like(offsets, settings.lowest)
    for kind in (edit_states.inside, ~edit_states.inside):
        thresholds[kind] = _rarely(F.linear(unrelated, directions[kind], offsets[kind]), settings)
    readings = (edit_states.states * directions[edit_states.key]).sum(1) + offsets[edit_states.key]
    lowest = torch.full_like(offsets, torch.inf).scatter_reduce(0, edit_states.key, readings, "amin")
    return thresholds.minimum((lowest - settings.ramp / 2).maximum(thresholds - settings.lower))


def _rarely(readings: Tensor, settings: GateSettings) -> float:
    """Return what a share of unrelated states (m, d) exceeds by any of their readings (m, k).

    Few states lie that far out, so their tail is taken to be exponential (peaks over a threshold).
    """
    if not readings.numel():
        return settings.lowest
    strongest = readings.amax(1)
    begins = quantile(strongest, 1 - settings.tail)
    beyond = strongest[strongest >= begins] - begins
    return max(settings.lowest, begins + float(beyond.mean()) * math.log(settings.tail / settings.false_alarm))


def _whitening(background: BackgroundStates, mean: Tensor, settings: GateSettings) -> Tensor:
    """Return the root (d, d) of the inverse of how states spread."""
    spread = _evened(background.unrelated - mean) + settings.wording * _evened(background.wording_offsets)
    values, vectors = torch.linalg.eigh(spread.double())
    values = values + settings.shrinkage * values.mean()
    root: Tensor = ((vectors * values.rsqrt()) @ vectors.T).float()
    return root


def _evened(rows: Tensor) -> Tensor:
    """Return the second moment (d, d) of rows (n, d), with 1 as its mean eigenvalue."""
    moment = rows.T @ rows
    return moment * (len(moment) / moment.trace().clamp(min=1e-12))
