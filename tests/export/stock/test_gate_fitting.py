"""Gates fitted to made-up states: open at their own, shut nearly everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wisecli.export.stock.gate_background import BackgroundStates
from wisecli.export.stock.gate_fitting import GateSettings, fit_gate
from wisecli.export.stock.gate_states import EditStates
from wisecli.export.stock.stock_checkpoint import Gate

SIZE, KEYS, WAYS = 48, 10, 6


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def own() -> EditStates:
    """Keys each of whose states are one point and some noise; every second key stands inside an answer."""
    points = 1.5 * drawn(1, KEYS, SIZE)
    states = (points[:, None] + 0.3 * drawn(2, KEYS, WAYS, SIZE)).flatten(0, 1)
    key = torch.arange(KEYS).repeat_interleave(WAYS)
    inside = torch.arange(KEYS) % 2 == 1
    return EditStates(states, key, torch.arange(KEYS), inside, drawn(3, KEYS, SIZE), drawn(4, 40, SIZE))


@pytest.fixture(scope="module")
def background() -> BackgroundStates:
    return BackgroundStates(drawn(5, 4000, SIZE), 0.3 * drawn(6, 300, SIZE))


@pytest.fixture(scope="module")
def gate(own: EditStates, background: BackgroundStates) -> Gate:
    return fit_gate(own, background)


def test_own_states_get_their_residuals_and_reworded_ones_too(gate: Gate, own: EditStates) -> None:
    wanted = own.values[own.key]
    assert (gate.update(own.states) - wanted).norm(dim=1).max() < 0.05 * wanted.norm(dim=1).min()
    means = torch.stack([own.states[own.key == number].mean(0) for number in range(KEYS)])
    reworded = (means[:, None] + 0.3 * drawn(7, KEYS, 50, SIZE)).flatten(0, 1)
    wanted = own.values.repeat_interleave(50, 0)
    found = (gate.update(reworded) - wanted).norm(dim=1) < 0.5 * wanted.norm(dim=1)
    assert found.float().mean() > 0.9


@pytest.mark.parametrize("false_alarm", [0.0006, 0.01])
def test_no_more_unrelated_states_open_a_key_than_are_allowed(
    own: EditStates, background: BackgroundStates, false_alarm: float
) -> None:
    # Without a lowest threshold, so that the rate alone decides.
    settings = GateSettings(false_alarm=false_alarm, lowest=-10.0, lower=0.0, tail=0.02)
    opened = (fit_gate(own, background, settings).readings(drawn(8, 40000, SIZE)) > 10).any(1).float().mean()
    # Both kinds of keys have the rate to themselves.
    assert opened < 2 * 2 * false_alarm
    # The tail of these states is lighter than an exponential one.
    assert opened > 0.2 * false_alarm


def test_a_key_whose_own_state_lies_low_opens_there_within_bounds(
    own: EditStates, background: BackgroundStates
) -> None:
    lost = own.states.clone()
    lost[0] = lost[0] * 0.45
    astray = replace(own, states=lost)
    bound = GateSettings(lowest=0.5, lower=0.0)
    lowered = replace(bound, lower=0.45)
    assert fit_gate(astray, background, bound).readings(lost[:1])[0, 0] < 10
    assert fit_gate(astray, background, lowered).readings(lost[:1])[0, 0] > 10


def test_a_memory_without_keys_inside_answers_has_a_gate(own: EditStates, background: BackgroundStates) -> None:
    found = fit_gate(replace(own, inside=torch.zeros(KEYS, dtype=torch.bool)), background)
    assert found.offsets.isfinite().all()
