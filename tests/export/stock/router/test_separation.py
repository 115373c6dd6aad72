"""Keys told apart exactly: no worse than any line that a plain optimizer finds, whatever the sizes."""

from dataclasses import replace

import pytest
import torch
from support.drawing import normal
from torch import Tensor

from wisecli.export.stock.router.separation import Separation

SIZE, RIDGE = 24, 0.05


def made(keys: int, others: int) -> Separation:
    """Keys of one to four states each, some of them near others."""
    key = torch.cat([torch.full((1 + number % 4,), number) for number in range(keys)])
    states = 0.8 * normal(keys, SIZE, seed=1)[key] + 0.3 * normal(len(key), SIZE, seed=2)
    return Separation(states, key, normal(others, SIZE, seed=3), RIDGE, 0.7, 0.1)


def losses(about: Separation, directions: Tensor, offsets: Tensor) -> Tensor:
    """What each key's line costs (K,), state by state."""
    states, keys = torch.cat([about.states, about.others]).double(), len(offsets)
    readings = states @ directions.double().T + offsets.double()
    owner = torch.cat([about.key, torch.full((len(about.others),), -1)])
    own = owner[:, None] == torch.arange(keys)
    missed = (own * (1 - readings).clamp(min=0).square()).sum(0) / own.sum(0)
    wrong = (~own * (readings + about.margin).clamp(min=0).square()).sum(0)
    return missed + about.negative * wrong + about.ridge * directions.double().square().sum(1)


def optimized(about: Separation, keys: int) -> tuple[Tensor, Tensor]:
    """Lines that a plain optimizer finds, all keys together."""
    line = [torch.zeros(keys, SIZE, dtype=torch.double), torch.zeros(keys, dtype=torch.double)]
    with torch.enable_grad():
        for part in line:
            part.requires_grad_()
        optimizer = torch.optim.LBFGS(line, max_iter=400, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = losses(about, *line).sum()
            total.backward()
            return total

        optimizer.step(loss)
    return line[0].detach(), line[1].detach()


# More keys than are solved side by side, more others than a working set holds, and fewer.
@pytest.mark.parametrize(("keys", "others"), [(5, 3), (9, 1500), (140, 60)])
def test_each_line_costs_no_more_than_an_optimizers(keys: int, others: int) -> None:
    about = made(keys, others)
    directions, offsets = about.solved()
    assert directions.shape == (keys, SIZE)
    best = losses(about, *optimized(about, keys))
    assert (losses(about, directions, offsets) - best).max() < 1e-3 * best.max()


def test_the_same_is_found_again() -> None:
    for one, other in zip(made(9, 1500).solved(), made(9, 1500).solved(), strict=True):
        assert torch.equal(one, other)


def test_several_threads_find_what_one_does() -> None:
    # So many others matter that the systems are larger than a thread solves by itself.
    about = replace(made(9, 4000), others=normal(4000, SIZE, seed=3) * 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        directions, offsets = about.solved()
    finally:
        torch.set_num_threads(before)
    alone, of_alone = about.solved()
    torch.testing.assert_close(directions, alone, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(offsets, of_alone, atol=1e-4, rtol=1e-3)
