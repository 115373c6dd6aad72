import pytest
import torch
from torch.nn import functional as F

from wisecli.memory.merging import quick_cosines
from wisecli.memory.merging.quick_cosines import QuickVectors, highest_in_parts

WIDTH = 128


def some_vectors(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Vectors of length 1, some of which point nearly the same way."""
    chance = torch.Generator().manual_seed(seed)
    ways = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    chosen = ways[torch.randint(0, 9, (count,), generator=chance)]
    return F.normalize(chosen + 0.4 * torch.randn(count, width, generator=chance), dim=-1)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("width", [WIDTH, 12])
def test_cosines_in_few_bits_are_off_by_little(monkeypatch: pytest.MonkeyPatch, quick: bool, width: int) -> None:
    monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: quick)
    one, other, rows = some_vectors(300, 1, width), some_vectors(200, 2, width), torch.arange(150, 0, -3)
    found, unit = QuickVectors.of(one).rows(rows).cosines(QuickVectors.of(other))
    apart = (found * unit - one[rows] @ other.T).abs()
    assert float(apart.max()) < 0.03
    assert float(apart.mean()) < 0.006
    assert (found.dtype == torch.int32) == quick


@pytest.mark.parametrize("most", [1, 10**6])
def test_the_highest_cosine_with_each_prompt_is_found(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: False)
    monkeypatch.setattr(quick_cosines, "_AT_A_TIME", most)
    kept, tokens = some_vectors(40, 3), some_vectors(5 * 7, 4)
    parts = list(highest_in_parts(QuickVectors.of(kept), QuickVectors.of(tokens), 7))
    expected = (kept @ tokens.T).view(40, 5, 7).amax(1).clamp(min=0)
    assert torch.allclose(torch.cat([highest for _, highest in parts]), expected, atol=1e-6)
    assert [part for some, _ in parts for part in range(40)[some]] == list(range(40))


def test_no_vectors_are_none() -> None:
    assert QuickVectors.of(torch.empty(0, WIDTH)).values.shape == (0, WIDTH)
    assert not list(highest_in_parts(QuickVectors.of(torch.empty(0, WIDTH)), QuickVectors.of(torch.empty(0, WIDTH)), 3))
