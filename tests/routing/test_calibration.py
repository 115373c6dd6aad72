from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import choose
from torch import Tensor, nn

from wisecli.routing.calibration import (
    calibrate,
    equalize_thresholds,
    excess_over_baseline,
    key_router,
    measure,
    quantile,
    scores_of,
)
from wisecli.routing.prompts import UNROUTED
from wisecli.routing.scores import MemoryScores, SideMemory
from wisecli.routing.side_memory import RoutedMatrix
from wisecli.routing.whitening import Moment, Whitening, whitening


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    values = torch.randn(30, 4, 5, generator=generator())
    expected = float(np.quantile(values.numpy(), share))
    assert quantile(values, share) == pytest.approx(expected, abs=1e-6)
    assert quantile(values.half(), share) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("false_alarm", [0.0, 0.001, 0.02, 0.5])
def test_false_alarms_are_let_through_in_the_share_asked_for(false_alarm: float) -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)) + 0.3, torch.rand(1000, generator=generator(3))
    found = calibrate(edits, unrelated, rule="false-alarm", false_alarm=false_alarm)
    assert found.rule == "false-alarm"
    assert found.threshold == pytest.approx(float(np.quantile(unrelated.numpy(), 1 - false_alarm)), abs=1e-6)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)
    assert abs(found.false_alarms - false_alarm) <= 1 / len(unrelated)
    assert found.misses == pytest.approx(np.mean(edits.numpy() <= found.threshold), abs=1e-6)


@pytest.mark.parametrize("false_alarm", [0.0, 0.02, 0.5])
def test_no_kind_of_unrelated_text_is_let_through_more_often_than_asked(false_alarm: float) -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)), torch.rand(1000, generator=generator(3))
    kinds = torch.arange(1000) < 50
    unrelated[kinds] += 0.3
    found = calibrate(edits, unrelated, rule="false-alarm", false_alarm=false_alarm, groups=kinds)
    shares = [float((unrelated[kinds == kind] > found.threshold).float().mean()) for kind in (True, False)]
    assert shares[0] == pytest.approx(false_alarm, abs=1 / 50)
    assert shares[1] <= false_alarm
    peaks, metric, elsewhere = torch.stack([unrelated, unrelated / 2], -1), torch.tensor([0, 1]), torch.zeros(2)
    _, level = equalize_thresholds(
        peaks, torch.zeros(len(metric)), metric, elsewhere, (false_alarm, false_alarm), groups=kinds
    )
    assert level == pytest.approx(min(found.threshold, 0.97), abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-3, 1e3))
def test_the_minimum_rule_routes_every_edit_and_lies_just_below_the_lowest(seed: int, size: float) -> None:
    edits = (torch.rand(20, generator=generator(seed)) + 0.01) * size
    unrelated = torch.rand(50, generator=generator(seed + 1)) * size
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.3)
    lowest = float(edits.min())
    assert found.threshold < lowest
    assert found.threshold == pytest.approx(lowest, rel=1e-5)
    assert (found.rule, found.misses) == ("minimum", 0.0)
    assert found.false_alarms == pytest.approx(np.mean(unrelated.numpy() > found.threshold), abs=1e-6)


def test_a_calibration_tells_the_quantiles_of_both_sides() -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)), torch.rand(1000, generator=generator(3))
    found = calibrate(edits, unrelated, rule="minimum", false_alarm=0.001)
    for summary, values in ((found.edit_scores, edits), (found.unrelated_scores, unrelated)):
        assert {"0", "0.5", "0.999", "1"} <= set(summary)
        for share, value in summary.items():
            assert value == pytest.approx(float(np.quantile(values.numpy(), float(share))), abs=2e-6)


@pytest.mark.parametrize("rule", ["false-alarm", "minimum"])
@pytest.mark.parametrize("lowest", [0.2, 0.0, -1.0], ids=["above nought", "from nought", "cosines around nought"])
@pytest.mark.parametrize("false_alarm", [0.001, 0.5])
def test_the_router_does_what_its_calibration_says(rule: str, lowest: float, false_alarm: float) -> None:
    edits, unrelated = (lowest + (0.8 - lowest) * torch.rand(101, generator=generator(seed)) for seed in (4, 5))
    found = calibrate(edits, unrelated, rule=rule, false_alarm=false_alarm)
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory({}, (found.threshold,), "key"), transposed=False)
    missed, alarmed = (float((choose(routed, side[:, None]) == UNROUTED).float().mean()) for side in (edits, unrelated))
    assert missed == pytest.approx(found.misses, abs=1e-6)
    assert 1 - alarmed == pytest.approx(found.false_alarms, abs=1e-6)


def test_a_threshold_decided_elsewhere_is_measured_as_it_is() -> None:
    edits, unrelated = torch.rand(40, generator=generator(2)), torch.rand(1000, generator=generator(3))
    for threshold in (-0.5, float(edits[3]), 0.7, 2.0):
        found = measure(edits, unrelated, threshold, rule="false-alarm")
        assert (found.threshold, found.rule) == (threshold, "false-alarm")
        assert found.misses == pytest.approx(sum(float(score) <= threshold for score in edits) / 40)
        assert found.false_alarms == pytest.approx(sum(float(score) > threshold for score in unrelated) / 1000)


# --- the key router ---


def whitenings(count: int, d_ff: int, *, rank: int = 4) -> list[Whitening]:
    found = []
    for number in range(count):
        directions = torch.linalg.qr(torch.randn(d_ff, rank, generator=generator(40 + number)))[0].T.contiguous()
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


@pytest.mark.parametrize("metrics", [1, 2, 3])
@pytest.mark.parametrize("memories", [1, 3])
def test_key_scores_are_plain_cosines_of_whitened_keys(metrics: int, memories: int) -> None:
    d_ff, count = 16, 9
    whites = whitenings(metrics, d_ff)
    edits, asked = (torch.randn(number, d_ff, generator=generator(number)) for number in (count, 25))
    owner, metric = torch.arange(count) % memories, torch.arange(count) // 2 % metrics
    tensors = key_router(edits, owner, metric, whites)
    found = scores_of(
        RoutedMatrix(nn.Linear(1, 1), SideMemory(tensors, (1.0,) * memories, "key"), transposed=False), asked
    )
    root = roots(whites)
    for row, key in enumerate(asked.double()):
        for number in range(memories):
            cosines = [
                float(torch.nn.functional.cosine_similarity(root[seen] @ key, root[seen] @ edit, dim=0))
                for edit, owned, seen in zip(edits.double(), owner.tolist(), metric.tolist(), strict=True)
                if owned == number
            ]
            assert float(found[row, number]) == pytest.approx(max(cosines), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_a_key_along_a_leading_direction_is_near_nothing(seed: int) -> None:
    """As an attention sink's: much longer than others, and along one direction, which half precision rounds."""
    width = 512
    sink = 0.001 * (1 + seed) * torch.randn(width, generator=generator(seed))
    sink[seed] = 1.0
    noise = 0.01 * torch.randn(200, width, generator=generator(9))
    quiet = torch.cat([torch.randn(2000, width, generator=generator(8)), 1000 * sink + noise])
    values, vectors = torch.linalg.eigh((quiet.T @ quiet / len(quiet)).double())
    moment = Moment(values.flip(0)[:8].float(), vectors.T.flip(0)[:8].float(), values.sum()[None].float())
    edits = torch.randn(5, width, generator=generator(10))
    tensors = key_router(edits, torch.arange(5), torch.zeros(5, dtype=torch.long), [whitening(moment)])
    tensors |= {name: tensors[name].half() for name in ("probes", "directions")}
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory(tensors, (1.0,) * 5, "key"), transposed=False)
    assert float(scores_of(routed, quiet).abs().max()) < 1
    assert float(scores_of(routed, edits).diagonal().min()) > 0.99


def test_an_edits_own_key_scores_one_whatever_its_size_and_whitening() -> None:
    edits = torch.randn(6, 16, generator=generator(7))
    tensors = key_router(edits, torch.arange(6), torch.arange(6) % 2, whitenings(2, 16))
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory(tensors, (1.0,) * 6, "key"), transposed=False)
    for size in (1.0, 0.01, 300.0):
        found = routed.scores(size * edits)
        assert torch.allclose(found.diagonal(), torch.ones(6), atol=1e-5)
        assert float((found - torch.eye(6)).max()) < 1 - 1e-3


def peaks_and_kinds() -> tuple[Tensor, Tensor, Tensor]:
    peaks = torch.rand(500, 2, generator=generator(9)) * torch.tensor([0.5, 0.8])
    metric = torch.tensor([0, 1, 0, 1, 1, 1])
    return peaks, metric, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.9, 0.99])


@pytest.mark.parametrize("shares", [(0.05, 0.01), (0.001, 0.2), (0.0, 0.0)])
def test_evened_out_keys_share_the_threshold_of_prompts(shares: tuple[float, float]) -> None:
    peaks, metric, elsewhere = peaks_and_kinds()
    factors, threshold = equalize_thresholds(peaks, torch.zeros(len(metric)), metric, elsewhere, shares)
    levels = [float(np.quantile(peaks[:, kind].numpy(), 1 - shares[kind])) for kind in (0, 1)]
    for factor, kind, near in zip(factors.tolist(), metric.tolist(), elsewhere.tolist(), strict=True):
        own = levels[kind] if near == 0 else max(levels[kind], min(near + 0.02, 0.97))
        # A cosine of the probe's own level is, after its factor, what a prompt's key must reach.
        assert 1 - factor * (1 - own) == pytest.approx(levels[0], rel=1e-5)
    assert factors[metric == 0].tolist() == pytest.approx([1.0, 1.0])
    assert threshold == pytest.approx(levels[0])


def test_evened_out_unrelated_keys_pass_in_the_shares_asked_for() -> None:
    peaks, metric, _ = peaks_and_kinds()
    factors, _ = equalize_thresholds(peaks, torch.zeros(6), metric, torch.zeros(6), (0.05, 0.01))
    limit = float(np.quantile(peaks[:, 0].numpy(), 0.95))
    for kind, share in ((0, 0.05), (1, 0.01)):
        compared = 1 - factors[metric == kind][0] * (1 - peaks[:, kind])
        passed = float((compared > limit + 1e-6).float().mean())
        assert passed == pytest.approx(share, abs=2 / 500)


def test_an_answer_is_not_opened_by_its_own_tokens_elsewhere() -> None:
    peaks, metric, elsewhere = peaks_and_kinds()
    factors, limit = equalize_thresholds(peaks, torch.zeros(len(metric)), metric, elsewhere, (0.05, 0.05))
    assert limit == pytest.approx(float(np.quantile(peaks[:, 0].numpy(), 0.95)))
    inside = (elsewhere > 0) & (elsewhere < 0.97)
    assert bool((1 - factors * (1 - elsewhere) < limit)[inside].all())


def noisy_router(whitening_id: Tensor, count: int) -> tuple[MemoryScores, Tensor]:
    """Three keys under whitenings that are all the same, and unrelated ones of which twenty are like the first."""
    edits = torch.eye(3, 16)
    unrelated = torch.randn(400, 16, generator=generator(11))
    unrelated[::20] = 4 * edits[0] + 0.8 * torch.randn(20, 16, generator=generator(12))
    tensors = key_router(edits, torch.arange(3), whitening_id, whitenings(1, 16) * count)
    return MemoryScores(SideMemory(tensors, (1.0,) * 3, "key")), unrelated


@pytest.mark.parametrize("batch", [3, 8, 50, 1024])
def test_usual_is_the_mean_of_the_eight_nearest_keys_and_a_key_is_compared_with_the_other_half(batch: int) -> None:
    routed, unrelated = noisy_router(torch.tensor([0, 1, 1]), 3)
    cosines = routed.cosines(unrelated)
    stretch = np.arange(400) * 64 // 400
    halves = [cosines[stretch % 2 == part].T.numpy() for part in (0, 1)]
    expected = torch.tensor([[np.sort(column)[-8:].mean() for column in half] for half in halves])
    usual, peaks = excess_over_baseline(routed, unrelated, torch.ones(3, dtype=torch.bool), batch=batch)
    assert usual.tolist() == pytest.approx(expected.mean(0).tolist(), abs=1e-5)
    assert usual[0] > 0.1 + usual[1:].max()
    for part in (0, 1):
        own = cosines[stretch % 2 == part] - expected[1 - part]
        assert torch.allclose(peaks[stretch % 2 == part, 0], own[:, 0], atol=1e-5)
        assert torch.allclose(peaks[stretch % 2 == part, 1], own[:, 1:].amax(-1), atol=1e-5)
    assert bool((peaks[:, 2] < -1).all())


def test_nothing_is_usual_for_a_probe_that_is_not_counted() -> None:
    routed, unrelated = noisy_router(torch.tensor([0, 1, 1]), 2)
    usual, peaks = excess_over_baseline(routed, unrelated, torch.tensor([True, False, False]))
    assert usual[0] > 0
    assert usual[1:].tolist() == [0, 0]
    assert torch.allclose(peaks[:, 1], routed.cosines(unrelated)[:, 1:].amax(-1), atol=1e-5)


def test_keys_to_come_are_let_through_no_oftener_than_asked_however_many_probes_have_bars_of_their_own() -> None:
    edits = torch.randn(300, 24, generator=generator(3))
    tensors = key_router(edits, torch.arange(300), torch.zeros(300, dtype=torch.long), whitenings(1, 24))
    routed = RoutedMatrix(nn.Linear(1, 1), SideMemory(tensors, (1.0,) * 300, "key"), transposed=False)
    seen, to_come = torch.randn(2, 4000, 24, generator=generator(4))
    usual, peaks = excess_over_baseline(routed, seen, torch.ones(300, dtype=torch.bool))
    bars = usual + quantile(peaks[:, 0], 1 - 0.01)
    assert float((routed.cosines(to_come) > bars).any(-1).float().mean()) == pytest.approx(0.01, abs=0.005)


def test_a_probe_that_unrelated_text_comes_near_to_raises_no_bar_but_its_own() -> None:
    metric, none = torch.zeros(3, dtype=torch.long), torch.zeros(3)
    routed, unrelated = noisy_router(metric, 1)
    bars = {}
    for counted in (True, False):
        usual, peaks = excess_over_baseline(routed, unrelated, torch.full((3,), counted))
        factors, level = equalize_thresholds(peaks, usual, metric, none, (0.02,))
        bars[counted] = 1 - (1 - level) / factors
        opened = (routed.cosines(unrelated) > bars[counted] + 1e-6).any(-1)
        assert float(opened.float().mean()) == pytest.approx(0.02, abs=3 / 400)
        assert level == pytest.approx(float(bars[counted].mean()), abs=1e-5)
    assert bars[False].tolist() == pytest.approx([float(bars[False][0])] * 3)
    assert bool((bars[True][1:] < bars[False][1:] - 0.1).all())
    assert bars[True][0] > bars[True][1:].max()


def test_a_kind_without_any_probe_has_no_say() -> None:
    peaks = torch.stack([torch.rand(100, generator=generator()), torch.full((100,), -1.0)], -1)
    factors, _ = equalize_thresholds(
        peaks, torch.zeros(3), torch.zeros(3, dtype=torch.long), torch.zeros(3), (0.05, 0.01)
    )
    assert factors.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("batch", [1, 3, 7, 4096])
def test_scores_of_many_keys_do_not_depend_on_how_they_are_cut(batch: int) -> None:
    tensors = {"columns": torch.tensor([[0, 2]]), "delta": torch.randn(1, 3, 2, generator=generator())}
    routed = RoutedMatrix(nn.Linear(4, 3), SideMemory(tensors, (1.0,)), transposed=False)
    keys = torch.randn(10, 4, generator=generator(1))
    expected = (keys[:, [0, 2]] @ tensors["delta"][0].T).norm(dim=-1, keepdim=True)
    assert torch.allclose(scores_of(routed, keys, batch=batch), expected, atol=1e-6)
