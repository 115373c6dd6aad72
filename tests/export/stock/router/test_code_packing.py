import pytest
import torch

from wisecli.export.stock.router.code_packing import coherence, packed_codes


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_few_codes_stand_at_right_angles(count: int) -> None:
    codes = packed_codes(count, 8)
    assert torch.equal(codes @ codes.T, torch.eye(count))
    assert coherence(codes) == 0


def test_more_codes_than_channels_are_pushed_apart() -> None:
    codes = packed_codes(60, 12)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(60))
    drawn = torch.nn.functional.normalize(torch.randn(60, 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert coherence(codes) < 0.75 * coherence(drawn)
    assert torch.equal(codes, packed_codes(60, 12))
    assert not codes.requires_grad


def test_very_many_codes_are_drawn_alone() -> None:
    codes = packed_codes(3001, 4)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(3001))


def test_the_coherence_is_the_largest_product_of_two() -> None:
    codes = torch.nn.functional.normalize(torch.randn(2500, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    products = (codes @ codes.T).fill_diagonal_(-1.0)
    assert coherence(codes) == pytest.approx(float(products.max()), abs=1e-5)
    assert coherence(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0
