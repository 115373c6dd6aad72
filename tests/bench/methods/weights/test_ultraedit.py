from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import keys_of
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, gradients_of, losses, rows_of

from wisecli.bench.methods.weights.ultraedit import Statistics, UltraEdit, UltraEditSettings

# The tiny models' layers 2 and 3.
UPPER = UltraEditSettings(first=2, last=3, of=5, rate=0.02)


def test_statistics_that_come_in_parts_are_those_of_the_whole() -> None:
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 3 + 2
    parts = Statistics(4)
    for part in rows.split([1, 12, 17]):
        parts.add(part)
    expected = (rows - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(parts.normalised(rows), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_keys_and_gradients_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = UltraEdit(bench, UPPER)
    method.edit(EDITS[2:])  # the second time, the model is an edited one
    found = method.tokens(EDITS[:1])
    row, model = rows_of(bench)[0], bench.loaded.model
    tokens, start = [*row.prompt, *row.target[:-1]], len(row.prompt) - 1
    with method.applied():
        for site, (keys, gradients) in zip(method.sites, found, strict=True):
            torch.testing.assert_close(keys, keys_of(model, site, tokens)[start:], atol=1e-4, rtol=1e-4)
            expected = gradients_of(model, site, tokens, row.target)[start:] / len(row.target)
            torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-3)


def test_the_change_is_the_ridge_solution(tmp_path: Path) -> None:
    method = UltraEdit(bench_for(tmp_path, "llama"), UPPER)
    site, generator = method.sites[0], torch.Generator().manual_seed(3)
    keys = torch.randn(9, site.d_ff, generator=generator)
    gradients = torch.randn(9, site.d, generator=generator)
    found = method.change(0, keys, gradients)
    both = torch.cat([keys, gradients], 1).double()
    turned = ((both - both.mean(0)) / both.std(0)).numpy()
    h, g = turned[:, : site.d_ff], turned[:, site.d_ff :]
    wanted = -0.02 / site.d_ff * (h**2).sum(1, keepdims=True) * g
    seen = np.concatenate([keys.double().numpy(), np.eye(site.d_ff)])
    expected = np.linalg.lstsq(seen, np.concatenate([wanted, np.zeros((site.d_ff, site.d))]), rcond=None)[0].T
    torch.testing.assert_close(found.double(), torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_a_step_lowers_the_loss_of_the_edits(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = UltraEdit(bench, UPPER)
    before = losses(bench)
    method.edit(EDITS)
    after = losses(bench, method)
    assert sum(after) < sum(before)
    check_holds_for_every_rewriting(bench, method)
