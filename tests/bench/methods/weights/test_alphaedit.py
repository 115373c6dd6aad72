from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses

from wisecli.bench.methods.base import UnsuitableError
from wisecli.bench.methods.weights.alphaedit import AlphaEdit, AlphaEditSettings, constrained
from wisecli.bench.methods.weights.memit import MemitSettings
from wisecli.bench.methods.weights.weight_editing import second_moment

THREE = MemitSettings(first=1, last=3, of=5)
# Of the few texts of these tests, which leave hardly any direction out.
WIDE = AlphaEditSettings(threshold=0.5, weight=0.05)


def test_the_solution_is_that_of_least_squares_within_the_null_space() -> None:
    generator = torch.Generator().manual_seed(2)
    earlier, keys, residuals = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 13), (4, 13), (4, 7))
    )
    free = torch.linalg.qr(torch.randn(13, 5, generator=generator, dtype=torch.float64)).Q
    delta = constrained(residuals, keys, free @ free.T, earlier.T @ earlier, 0.3)
    # The least of ‖X Fᵀ K - R‖² + λ ‖X‖² + ‖X Fᵀ K_p‖² over X (d, 5), with Δ = X Fᵀ.
    seen = torch.cat([keys @ free, earlier @ free, 0.3**0.5 * torch.eye(5, dtype=torch.float64)]).numpy()
    wanted = torch.cat([residuals, torch.zeros(11, 7, dtype=torch.float64)]).numpy()
    expected = torch.tensor(np.linalg.lstsq(seen, wanted, rcond=None)[0]).T @ free.T
    torch.testing.assert_close(delta, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_texts_say_hardly_moves_and_edits_take(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = AlphaEdit(bench, replace(THREE, search=replace(THREE.search, limit=5.0)), WIDE)
    before = losses(bench)
    method.edit(EDITS[:2])
    after = losses(bench, method)
    assert sum(after[:2]) < sum(before[:2]) - 0.2
    for site, delta in zip(method.sites, method.deltas, strict=True):
        sizes, directions = torch.linalg.eigh(second_moment(bench, site))
        kept = directions[:, sizes >= 0.5 * sizes.mean()].float()
        assert kept.shape[1]
        assert (delta @ kept).abs().max() < 1e-4 * delta.abs().max()
    check_holds_for_every_rewriting(bench, method)


def test_later_edits_spare_the_keys_of_earlier_ones(tmp_path: Path) -> None:
    method = AlphaEdit(bench_for(tmp_path, "llama"), THREE, WIDE)
    generator = torch.Generator().manual_seed(4)
    size, d = method.sites[0].d_ff, method.sites[0].d
    first, second = (torch.randn(3, size, generator=generator) for _ in range(2))
    residuals = torch.randn(3, d, generator=generator)
    alone = method.change(0, residuals, second)
    method._earlier[0].zero_()
    method.change(0, residuals, 100 * first)
    beside = method.change(0, residuals, second)
    projected = (first.double() @ method._statistics[0]).float()
    assert (projected @ beside.T).norm() < 0.2 * (projected @ alone.T).norm()


def test_a_model_without_a_free_direction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableError, match="no direction free"):
        AlphaEdit(bench_for(tmp_path, "llama"), THREE, AlphaEditSettings(threshold=0.0))
