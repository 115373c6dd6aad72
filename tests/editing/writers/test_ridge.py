import pytest
import torch
from support.drawing import normal
from torch import Tensor

from wisecli.editing.writers.ridge import Penalty, Statistics, solve, statistics

D, D_FF = 5, 12
PENALTIES = [Penalty(1e-1, 0.0), Penalty(1e-3, 0.1), Penalty(1e-2, 10.0), Penalty(1e-6, 1e-6)]
penalties = pytest.mark.parametrize("penalty", PENALTIES, ids=str)
some_columns = pytest.mark.parametrize("columns", [None, (0, 3, 4, 10), (7,)], ids=["all", "four", "one"])


def moment() -> Tensor:
    """A second moment of very uneven directions, far from any scale that the solver would choose."""
    rows = normal(40, D_FF, seed=3) @ torch.diag(torch.linspace(0.1, 4.0, D_FF)) @ normal(D_FF, D_FF, seed=4)
    return 70 * rows.T @ rows / len(rows)


def problem(count: int = 30) -> tuple[Tensor, Tensor]:
    return normal(count, D_FF, seed=1) * torch.linspace(0.2, 3.0, D_FF), normal(count, D, seed=2)


def weights_of(keys: Tensor, penalty: Penalty) -> tuple[float, float]:
    """What the ridge and the unrelated keys weigh, in units of the mean of a squared entry of the keys."""
    energy = float(keys.double().square().mean())
    return energy * penalty.ridge, energy * penalty.unrelated


def objective(delta: Tensor, start: Tensor, keys: Tensor, values: Tensor, even: Tensor, penalty: Penalty) -> Tensor:
    """The sum that the solution makes least, as the module's text states it, in float64."""
    ridge, unrelated = weights_of(keys, penalty)
    change = delta - start
    missed = (keys @ delta.T - values).square().sum() / len(keys)
    return missed + unrelated * torch.trace(change @ even @ change.T) + ridge * change.square().sum()


def augmented(keys: Tensor, values: Tensor, even: Tensor, penalty: Penalty) -> Tensor:
    """The same least squares with the penalties as further rows, by LAPACK's QR."""
    ridge, unrelated = weights_of(keys, penalty)
    size = keys.shape[1]
    variances, vectors = torch.linalg.eigh(even)
    root = vectors @ torch.diag(variances.clamp(min=0).sqrt()) @ vectors.T
    rows = torch.cat([keys / len(keys) ** 0.5, unrelated**0.5 * root, ridge**0.5 * torch.eye(size).double()])
    sought = torch.cat([values / len(keys) ** 0.5, torch.zeros(2 * size, values.shape[1]).double()])
    found: Tensor = torch.linalg.lstsq(rows, sought, driver="gelsd").solution.T
    return found


def scaled(columns: list[int]) -> Tensor:
    """The moment on some columns, at mean eigenvalue 1."""
    part = moment().double()[columns][:, columns]
    return part * len(columns) / part.trace()


@penalties
@some_columns
@pytest.mark.parametrize("count", [30, 4], ids=["many keys", "few keys"])
def test_the_solution_is_that_of_augmented_least_squares(
    penalty: Penalty, columns: tuple[int, ...] | None, count: int
) -> None:
    keys, values = problem(count)
    used = list(columns or range(D_FF))
    chosen = None if columns is None else torch.tensor(columns)
    found = solve(statistics(keys, values), penalty, moment(), columns=chosen)
    assert found.shape == (D, len(used))
    assert found.dtype == torch.float32
    expected = augmented(keys[:, used].double(), values.double(), scaled(used), penalty)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@penalties
@some_columns
@pytest.mark.parametrize("around", [False, True])
def test_the_objective_has_no_slope_at_the_solution(
    penalty: Penalty, columns: tuple[int, ...] | None, around: bool
) -> None:
    keys, values = problem()
    used = list(columns or range(D_FF))
    chosen = None if columns is None else torch.tensor(columns)
    start = normal(D, len(used), seed=5) if around else None
    found = solve(statistics(keys, values), penalty, moment(), columns=chosen, around=start).double().requires_grad_()
    zero = torch.zeros(D, len(used))
    known = ((zero if start is None else start).double(), keys[:, used].double(), values.double(), scaled(used))
    gradient = torch.autograd.grad(objective(found, *known, penalty), found)[0]
    usual = torch.autograd.grad(objective(found + 1, *known, penalty), found)[0]
    assert float(gradient.norm()) < 1e-5 * float(usual.norm())
    found = found.detach()
    least = float(objective(found, *known, penalty))
    for seed in range(5):
        step = 0.05 * normal(D, len(used), seed=20 + seed).double()
        assert float(objective(found + step, *known, penalty)) > least


def test_with_next_to_no_penalty_every_key_gets_its_residual() -> None:
    keys, values = problem(count=6)
    found = solve(statistics(keys, values), Penalty(1e-9, 0.0), moment())
    assert torch.allclose(keys @ found.T, values, atol=1e-4)


def test_unrelated_keys_are_disturbed_the_less_the_more_they_weigh() -> None:
    keys, values = problem()
    disturbed = [
        float(torch.trace(found @ moment() @ found.T))
        for found in (solve(statistics(keys, values), Penalty(1e-4, weight), moment()) for weight in (0.0, 0.01, 1.0))
    ]
    assert disturbed[0] > disturbed[1] > disturbed[2]


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_the_scale_of_the_unrelated_moment_does_not_matter(scale: float) -> None:
    known = statistics(*problem())
    found, other = (solve(known, Penalty(1e-2, 0.3), size * moment()) for size in (1.0, scale))
    assert torch.allclose(found, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 30.0])
def test_larger_keys_need_a_change_as_much_smaller(scale: float) -> None:
    keys, values = problem()
    found, other = (solve(statistics(size * keys, values), Penalty(1e-2, 0.3), moment()) for size in (1.0, scale))
    assert torch.allclose(found, scale * other, rtol=1e-4, atol=1e-6)


# --- statistics ---


def test_statistics_are_sums_over_single_keys() -> None:
    keys, values = problem()
    found = statistics(keys, values)
    gram, cross = torch.zeros(D_FF, D_FF).double(), torch.zeros(D_FF, D).double()
    for key, value in zip(keys.double(), values.double(), strict=True):
        gram += torch.outer(key, key)
        cross += torch.outer(key, value)
    assert (found.gram.dtype, found.cross.dtype, found.count) == (torch.float64, torch.float64, 30)
    assert torch.allclose(found.gram, gram, rtol=1e-12)
    assert torch.allclose(found.cross, cross, rtol=1e-12)


@penalties
@pytest.mark.parametrize("cut", [1, 11, 29])
def test_the_statistics_of_two_parts_solve_for_all_keys_at_once(penalty: Penalty, cut: int) -> None:
    keys, values = problem()
    parts = statistics(keys[:cut], values[:cut]) + statistics(keys[cut:], values[cut:])
    assert parts.count == 30
    found, whole = (solve(known, penalty, moment()) for known in (parts, statistics(keys, values)))
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_statistics_of_nothing_change_nothing() -> None:
    keys, values = problem()
    known = statistics(keys, values)
    nothing = statistics(keys[:0], values[:0])
    both = known + nothing
    assert (both.count, nothing.count) == (30, 0)
    assert torch.equal(solve(both, PENALTIES[0], moment()), solve(known, PENALTIES[0], moment()))
    assert torch.equal(solve(nothing, PENALTIES[0], moment()), torch.zeros(D, D_FF))


def test_solving_leaves_its_arguments_as_they_are() -> None:
    known, unrelated, start = statistics(*problem()), moment(), normal(D, D_FF, seed=5)
    before = [tensor.clone() for tensor in (known.gram, known.cross, unrelated, start)]
    solve(known, PENALTIES[1], unrelated, around=start)
    solve(Statistics(known.gram, known.cross, 1), PENALTIES[1], unrelated.double())
    for tensor, kept in zip((known.gram, known.cross, unrelated, start), before, strict=True):
        assert torch.equal(tensor, kept)


# --- around a given change ---


@penalties
def test_a_change_that_already_adds_the_residuals_is_left_alone(penalty: Penalty) -> None:
    keys, start = problem()[0], normal(D, D_FF, seed=5)
    found = solve(statistics(keys.double(), keys.double() @ start.double().T), penalty, moment(), around=start)
    assert torch.allclose(found, start, atol=1e-6)


@penalties
def test_around_a_change_only_what_it_leaves_is_solved_for(penalty: Penalty) -> None:
    keys, values = problem()
    start = normal(D, D_FF, seed=5)
    found = solve(statistics(keys, values), penalty, moment(), around=start)
    lost = values.double() - keys.double() @ start.double().T
    expected = start.double() + augmented(keys.double(), lost, scaled(list(range(D_FF))), penalty)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
