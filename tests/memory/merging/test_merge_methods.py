import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from reference import wise as reference
from torch import Tensor

from wisecli.errors import SettingsError
from wisecli.memory.merging.merge_methods import METHODS, Recipe, merge_deltas, spherical

SHAPE = (6, 10)
EVERY_METHOD = ("dare", "dare-ties", "linear", "magnitude", "sign", "slerp", "ties")
densities = pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.77, 0.99])
seeds = st.integers(0, 2**31)


def random_deltas(seed: int, count: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def recipe(
    count: int, *, weights: list[float] | None = None, density: float = 0.5, base: Tensor | None = None, seed: int = 0
) -> Recipe:
    return Recipe(
        torch.tensor(weights or [1.0] * count),
        density,
        torch.zeros(SHAPE) if base is None else base,
        torch.Generator().manual_seed(seed),
    )


def test_these_are_all_the_methods() -> None:
    assert sorted(METHODS) == sorted(EVERY_METHOD)


@pytest.mark.parametrize("method", ["", "TIES", "average"])
def test_an_unknown_method_is_refused_with_those_known(method: str) -> None:
    with pytest.raises(SettingsError) as caught:
        merge_deltas(method, random_deltas(0, 2), recipe(2))
    assert all(known in str(caught.value) for known in EVERY_METHOD)


# --- against loops, and against peft ---


@settings(deadline=None)
@given(
    seed=seeds,
    weights=st.lists(st.floats(0.125, 4, width=32), min_size=2, max_size=5),
    density=st.floats(0.001, 0.999),
    d=st.integers(1, 7),
    d_ff=st.integers(2, 9),
    masked=st.booleans(),
)
def test_trimming_and_electing_signs_are_those_of_loops(
    seed: int, weights: list[float], density: float, d: int, d_ff: int, *, masked: bool
) -> None:
    deltas = random_deltas(seed, len(weights), (d, d_ff))
    for number, delta in enumerate(deltas if masked else ()):
        delta[:, number::2] = 0
    trimmed = [reference.trim(delta, density) for delta in deltas]
    expected = {
        "ties": reference.ties(deltas, weights, density),
        "sign": reference.disjoint_merge(deltas, weights, reference.elect_sign(deltas)),
        "magnitude": sum(weight * delta for weight, delta in zip(weights, trimmed, strict=True)),
    }
    for method, merged in expected.items():
        found = merge_deltas(method, deltas, recipe(len(weights), weights=weights, density=density))
        assert torch.allclose(found, torch.as_tensor(merged), rtol=1e-5, atol=1e-5), method


@densities
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.25]])
def test_ties_agrees_with_peft(density: float, weights: list[float]) -> None:
    deltas = random_deltas(1, 3)
    oracle = merge_utils.ties(list(deltas), torch.tensor(weights), density)
    merged = merge_deltas("ties", deltas, recipe(3, weights=weights, density=density))
    assert torch.allclose(merged, oracle, rtol=0, atol=1e-6)


@settings(deadline=None)
@given(seed=seeds, weights=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=6))
def test_linear_agrees_with_peft(seed: int, weights: list[float]) -> None:
    deltas = random_deltas(seed, len(weights))
    oracle = merge_utils.task_arithmetic(list(deltas), torch.tensor(weights))
    merged = merge_deltas("linear", deltas, recipe(len(weights), weights=weights))
    assert torch.allclose(merged, oracle, atol=1e-5)


# --- by hand ---


def test_ties_by_hand() -> None:
    first = torch.tensor([[4.0, 1.0, -3.0, 0.5]])
    second = torch.tensor([[2.0, -5.0, 6.0, 0.1]])
    third = torch.tensor([[-9.0, 0.3, 8.0, 0.2]])
    # The two largest of each: (4, ., -3, .), (., -5, 6, .), (-9, ., 8, .).
    expected = torch.tensor([[-9.0, -5.0, 7.0, 0.0]])
    deltas = torch.stack([first, second, third])
    assert torch.allclose(merge_deltas("ties", deltas, recipe(3, density=0.5)), expected)


def test_sign_by_hand() -> None:
    deltas = torch.tensor([[[4.0, 1.0, 0.0, 1.0]], [[2.0, -5.0, 0.0, -1.0]], [[-9.0, -1.0, 0.0, 2.0]]])
    expected = torch.tensor([[-9.0, -3.0, 0.0, 1.5]])
    assert torch.allclose(merge_deltas("sign", deltas, recipe(3)), expected)


@pytest.mark.parametrize("method", ["ties", "linear", "magnitude", "sign", "slerp"])
def test_the_order_of_two_equal_shards_does_not_matter(method: str) -> None:
    deltas, base = random_deltas(5, 2), random_deltas(6, 1)[0]
    forward = merge_deltas(method, deltas, recipe(2, base=base))
    assert torch.allclose(forward, merge_deltas(method, deltas.flip(0), recipe(2, base=base)), atol=1e-5)


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_single_delta_stays_as_it_is(method: str, density: float) -> None:
    deltas = random_deltas(7, 1)
    assert torch.equal(merge_deltas(method, deltas, recipe(1, density=density)), deltas[0])


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("count", [1, 3])
def test_the_scale_multiplies_the_result(method: str, count: int) -> None:
    deltas, base = random_deltas(8, count), random_deltas(9, 1)[0]
    plain = merge_deltas(method, deltas, recipe(count, base=base))
    assert torch.allclose(merge_deltas(method, deltas, recipe(count, base=base), scale=2.5), 2.5 * plain, atol=1e-6)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_merging_changes_neither_the_deltas_nor_the_base(method: str) -> None:
    deltas, base = random_deltas(10, 3), random_deltas(11, 1)[0]
    kept = deltas.clone(), base.clone()
    merge_deltas(method, deltas, recipe(3, base=base))
    assert torch.equal(deltas, kept[0])
    assert torch.equal(base, kept[1])


# --- at random ---


def expectation(deltas: Tensor, density: float, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over every way of dropping, entry by entry; entries do not meddle with each other."""
    total = torch.zeros_like(deltas[0])
    for kept in itertools.product([0.0, 1.0], repeat=len(deltas)):
        chance = math.prod(density if one else 1 - density for one in kept)
        total += chance * merge(deltas * torch.tensor(kept)[:, None, None] / density)
    return total


def test_dare_is_the_weighted_sum_in_expectation() -> None:
    deltas, weights, density, rounds = random_deltas(12, 3), [1.0, 0.5, 2.0], 0.4, 3000
    chance = recipe(3, weights=weights, density=density)
    mean = torch.stack([merge_deltas("dare", deltas, chance) for _ in range(rounds)]).mean(0)
    weighted = deltas * torch.tensor(weights)[:, None, None]
    error = (weighted.square().sum(0) * (1 - density) / density / rounds).sqrt()
    assert float(((mean - weighted.sum(0)) / error).abs().max()) < 5


def test_dare_ties_is_pefts_disjoint_merge_in_expectation() -> None:
    deltas, density, rounds = random_deltas(13, 3), 0.4, 3000

    def oracle(dropped: Tensor) -> Tensor:
        return merge_utils.disjoint_merge(dropped, merge_utils.calculate_majority_sign_mask(dropped))

    chance = recipe(3, density=density)
    merged = torch.stack([merge_deltas("dare-ties", deltas, chance) for _ in range(rounds)])
    expected = expectation(deltas, density, oracle)
    variance = expectation(deltas, density, lambda dropped: oracle(dropped).square()) - expected.square()
    assert float(((merged.mean(0) - expected) / (variance / rounds).sqrt()).abs().max()) < 5


def test_dare_keeps_each_entry_whole_or_drops_it() -> None:
    deltas, density = torch.stack([torch.ones(100, 100), torch.full((100, 100), 10.0)]), 0.25
    merged = merge_deltas("dare", deltas, recipe(2, density=density)) * density
    assert set(merged.unique().tolist()) == {0.0, 1.0, 10.0, 11.0}
    for value, share in ((0.0, 0.75**2), (1.0, 0.25 * 0.75), (10.0, 0.75 * 0.25), (11.0, 0.25**2)):
        error = math.sqrt(share * (1 - share) / merged.numel())
        assert abs(float((merged == value).float().mean()) - share) < 5 * error


@pytest.mark.parametrize(("method", "without"), [("dare", "linear"), ("dare-ties", "sign")])
def test_dropping_nothing_changes_nothing(method: str, without: str) -> None:
    deltas = random_deltas(14, 3)
    merged = merge_deltas(method, deltas, recipe(3, density=1.0))
    assert torch.allclose(merged, merge_deltas(without, deltas, recipe(3)), atol=1e-6)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dropping_is_decided_by_the_seed(method: str) -> None:
    deltas = random_deltas(15, 3)
    first, again, other = (merge_deltas(method, deltas, recipe(3, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- spherical ---


def formula(first: Tensor, second: Tensor, share: float) -> Tensor:
    a, b = first.double().flatten(), second.double().flatten()
    angle = math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    mixed = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    return mixed.view_as(first)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.2, 0.5]])
def test_slerp_of_two_follows_its_formula(weights: list[float]) -> None:
    deltas, base = random_deltas(16, 2), random_deltas(17, 1)[0]
    merged = merge_deltas("slerp", deltas, recipe(2, weights=weights, base=base))
    expected = formula(base + deltas[0], base + deltas[1], weights[1] / sum(weights)) - base.double()
    assert torch.allclose(merged.double(), expected, atol=1e-5)


def test_slerp_of_three_goes_on_from_where_two_met() -> None:
    deltas, base, weights = random_deltas(18, 3), random_deltas(19, 1)[0], [1.0, 2.0, 5.0]
    merged = merge_deltas("slerp", deltas, recipe(3, weights=weights, base=base))
    two = formula(base + deltas[0], base + deltas[1], 2 / 3)
    expected = formula(two, (base + deltas[2]).double(), 5 / 8) - base.double()
    assert torch.allclose(merged.double(), expected, atol=1e-5)


@settings(deadline=None)
@given(seed=seeds, share=st.floats(0, 1))
def test_between_matrices_of_one_length_slerp_keeps_the_length_and_divides_the_angle(seed: int, share: float) -> None:
    first, second = (matrix / matrix.norm() for matrix in random_deltas(seed, 2).double())
    between = spherical(first, second, share)
    angle = math.acos(float((first * second).sum()))
    assert float(between.norm()) == pytest.approx(1, abs=1e-9)
    assert float((first * between).sum()) == pytest.approx(math.cos(share * angle), abs=1e-9)
    assert float((second * between).sum()) == pytest.approx(math.cos((1 - share) * angle), abs=1e-9)


@pytest.mark.parametrize("distance", [1e-3, 0.03, 0.3])
def test_between_close_matrices_slerp_still_follows_its_formula(distance: float) -> None:
    first, other = random_deltas(25, 2).double()
    second = first + distance * other
    assert torch.allclose(spherical(first, second, 0.3), formula(first, second, 0.3), rtol=0, atol=1e-9)


def test_slerp_begins_and_ends_at_its_matrices() -> None:
    first, second = random_deltas(20, 2)
    assert torch.allclose(spherical(first, second, 0.0), first, atol=1e-6)
    assert torch.allclose(spherical(first, second, 1.0), second, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_between_parallel_matrices_slerp_goes_straight(factor: float, share: float) -> None:
    first = random_deltas(21, 1)[0]
    expected = first * (1 - share + share * factor)
    assert torch.allclose(spherical(first, factor * first, share), expected, rtol=1e-4, atol=1e-5)


def test_between_matrices_that_hardly_differ_slerp_is_the_mean() -> None:
    base, deltas = random_deltas(22, 1)[0], 1e-3 * random_deltas(23, 2)
    merged = merge_deltas("slerp", deltas, recipe(2, base=base))
    assert torch.allclose(merged, deltas.mean(0), atol=1e-5)


def test_slerp_of_a_matrix_of_noughts_is_finite() -> None:
    first = torch.zeros(SHAPE)
    assert bool(spherical(first, random_deltas(24, 1)[0], 0.5).isfinite().all())
