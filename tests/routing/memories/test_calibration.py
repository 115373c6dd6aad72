import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drawing import seeded
from torch import Tensor

from wisecli.routing.memories.calibration import calibrate, measure, quantile
from wisecli.routing.memories.fact_memory import RoutingKeys
from wisecli.routing.memories.matrix_memory import MatrixMemory
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.memories.whitening import Moment, Whitening, whitening

# --- quantiles and thresholds ---


@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=60),
    share=st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.999, 1.0]),
)
def test_a_quantile_is_numpys(values: list[float], share: float) -> None:
    expected = float(np.quantile(np.array(values, dtype=np.float64), share))
    assert quantile(torch.tensor(values), share) == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.999, 1.0])
def test_a_quantile_of_a_table_is_that_of_all_its_entries(share: float) -> None:
    values = torch.randn(30, 4, 5, generator=seeded())
    expected = float(np.quantile(values.numpy(), share))
    assert quantile(values, share) == pytest.approx(expected, abs=1e-6)
    assert quantile(values.half(), share) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("false_alarm", [0.0, 0.001, 0.02, 0.5])
def test_false_alarms_are_let_through_in_the_share_asked_for(false_alarm: float) -> None:
    edits, unrelated = torch.rand(40, generator=seeded(2)) + 0.3, torch.rand(1000, generator=seeded(3))
    found = calibrate(edits, unrelated, rule="false-alarm", false_alarm=false_alarm)
    assert found.rule == "false-alarm"
    assert found.threshold == pytest.approx(float(np.quantile(unrelated.numpy(), 1 - false_alarm)), abs=1e-6)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)
    assert abs(found.false_alarms - false_alarm) <= 1 / len(unrelated)
    assert found.misses == pytest.approx(np.mean(edits.numpy() <= found.threshold), abs=1e-6)


@pytest.mark.parametrize("false_alarm", [0.0, 0.02, 0.5])
def test_no_kind_of_unrelated_text_is_let_through_more_often_than_asked(false_alarm: float) -> None:
    edits, unrelated = torch.rand(40, generator=seeded(2)), torch.rand(1000, generator=seeded(3))
    kinds = torch.arange(1000) < 50
    unrelated[kinds] += 0.3
    found = calibrate(edits, unrelated, rule="false-alarm", false_alarm=false_alarm, groups=kinds)
    shares = [float((unrelated[kinds == kind] > found.threshold).float().mean()) for kind in (True, False)]
    assert shares[0] == pytest.approx(false_alarm, abs=1 / 50)
    assert shares[1] <= false_alarm


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-3, 1e3))
def test_the_minimum_rule_routes_every_edit_and_lies_just_below_the_lowest(seed: int, size: float) -> None:
    edits = (torch.rand(20, generator=seeded(seed)) + 0.01) * size
    unrelated = torch.rand(50, generator=seeded(seed + 1)) * size
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.3)
    lowest = float(edits.min())
    assert found.threshold < lowest
    assert found.threshold == pytest.approx(lowest, rel=1e-5)
    assert (found.rule, found.misses) == ("minimum", 0.0)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)


def test_a_calibration_tells_the_quantiles_of_both_sides() -> None:
    edits, unrelated = torch.rand(40, generator=seeded(2)), torch.rand(1000, generator=seeded(3))
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.001)
    for summary, values in ((found.edit_scores, edits), (found.unrelated_scores, unrelated)):
        assert {"0", "0.5", "0.999", "1"} <= set(summary)
        for share, value in summary.items():
            assert value == pytest.approx(float(np.quantile(values.numpy(), float(share))), abs=2e-6)


@pytest.mark.parametrize("rule", ["false-alarm", "minimum"])
@pytest.mark.parametrize("lowest", [0.2, 0.0, -1.0], ids=["above zero", "from zero", "cosines around zero"])
@pytest.mark.parametrize("false_alarm", [0.001, 0.5])
def test_the_router_does_what_its_calibration_says(rule: str, lowest: float, false_alarm: float) -> None:
    edits, unrelated = (lowest + (0.8 - lowest) * torch.rand(101, generator=seeded(seed)) for seed in (4, 5))
    found = calibrate(edits, unrelated, rule=rule, false_alarm=false_alarm)
    memory = MatrixMemory(SideMemory({}, (found.threshold,)))
    missed, alarmed = (
        float((memory.best_score_ratio(side[:, None])[0] <= 1).float().mean()) for side in (edits, unrelated)
    )
    assert missed == pytest.approx(found.misses, abs=1e-6)
    assert 1 - alarmed == pytest.approx(found.false_alarms, abs=1e-6)


def test_a_threshold_decided_elsewhere_is_measured_as_it_is() -> None:
    edits, unrelated = torch.rand(40, generator=seeded(2)), torch.rand(1000, generator=seeded(3))
    for threshold in (-0.5, float(edits[3]), 0.7, 2.0):
        found = measure(edits, unrelated, threshold, rule="false-alarm")
        assert (found.threshold, found.rule) == (threshold, "false-alarm")
        assert found.misses == pytest.approx(sum(float(score) <= threshold for score in edits) / 40)
        assert found.false_alarms == pytest.approx(sum(float(score) > threshold for score in unrelated) / 1000)


# --- the keys of a lookup ---


def whitenings(count: int, d_ff: int, *, rank: int = 4) -> list[Whitening]:
    found = []
    for number in range(count):
        directions = torch.linalg.qr(torch.randn(d_ff, rank, generator=seeded(40 + number)))[0].T.contiguous()
        gains = torch.linspace(-0.4 + 0.1 * number, 3.0, rank)
        found.append(Whitening(directions, gains, 0.6 + 0.5 * number))
    return found


def roots(whites: list[Whitening]) -> list[Tensor]:
    """Symmetric square roots of the whitenings, from their definition."""
    found = []
    for white in whites:
        even = white.floor * torch.eye(white.directions.shape[1])
        values, vectors = torch.linalg.eigh(
            (even + white.directions.T @ white.gains.diag() @ white.directions).double()
        )
        found.append(vectors @ values.sqrt().diag() @ vectors.T)
    return found


def routing_keys(
    keys: Tensor, key_to_edit: Tensor, whitening_index: Tensor, whitenings: list[Whitening]
) -> dict[str, Tensor]:
    """The tensors of keys of edits (n, d_ff), each under the whitening of its index (n,)."""
    pairs = zip(keys.split(1), whitening_index.tolist(), strict=True)
    return {
        "whitened_keys": torch.cat([whitenings[number].whitened_keys(key) for key, number in pairs]),
        "cosine_offset": torch.zeros(len(keys)),
        "key_to_edit": key_to_edit,
        "whitening_index": whitening_index,
        "directions": torch.stack([white.directions for white in whitenings]),
        "gains": torch.stack([white.gains for white in whitenings]),
        "floors": torch.tensor([white.floor for white in whitenings]),
    }


def keys_of(tensors: dict[str, Tensor]) -> RoutingKeys:
    found = RoutingKeys()
    for name, tensor in tensors.items():
        found.register_buffer(name, tensor)
    return found


@pytest.mark.parametrize("metrics", [1, 2, 3])
def test_cosines_are_those_of_whitened_keys(metrics: int) -> None:
    d_ff, count = 16, 9
    whites = whitenings(metrics, d_ff)
    edits, asked = (torch.randn(number, d_ff, generator=seeded(number)) for number in (count, 25))
    metric = torch.arange(count) // 2 % metrics
    found = keys_of(routing_keys(edits, torch.arange(count), metric, whites)).cosines(asked, torch.arange(count))
    root = roots(whites)
    for row, key in zip(found, asked.double(), strict=True):
        expected = [
            float(torch.nn.functional.cosine_similarity(root[seen] @ key, root[seen] @ edit, dim=0))
            for edit, seen in zip(edits.double(), metric.tolist(), strict=True)
        ]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_a_key_along_a_leading_direction_is_near_nothing(seed: int) -> None:
    """As an attention sink's: much longer than others, and along one direction, which half precision rounds."""
    width = 512
    sink = 0.001 * (1 + seed) * torch.randn(width, generator=seeded(seed))
    sink[seed] = 1.0
    noise = 0.01 * torch.randn(200, width, generator=seeded(9))
    quiet = torch.cat([torch.randn(2000, width, generator=seeded(8)), 1000 * sink + noise])
    values, vectors = torch.linalg.eigh((quiet.T @ quiet / len(quiet)).double())
    moment = Moment(values.flip(0)[:8].float(), vectors.T.flip(0)[:8].float(), values.sum()[None].float())
    edits, every = torch.randn(5, width, generator=seeded(10)), torch.arange(5)
    tensors = routing_keys(edits, every, torch.zeros(5, dtype=torch.long), [whitening(moment)])
    tensors |= {name: tensors[name].half() for name in ("whitened_keys", "directions")}
    keys = keys_of(tensors)
    assert float(keys.cosines(quiet, every).abs().max()) < 1
    assert float(keys.cosines(edits, every).diagonal().min()) > 0.99


def test_an_edits_own_key_scores_one_whatever_its_size_and_whitening() -> None:
    edits, every = torch.randn(6, 16, generator=seeded(7)), torch.arange(6)
    keys = keys_of(routing_keys(edits, every, every % 2, whitenings(2, 16)))
    for size in (1.0, 0.01, 300.0):
        found = keys.cosines(size * edits, every)
        assert torch.allclose(found.diagonal(), torch.ones(6), atol=1e-5)
        assert float((found - torch.eye(6)).max()) < 1 - 1e-3
