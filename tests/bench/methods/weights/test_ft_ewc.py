from pathlib import Path

import pytest
import torch
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses, words
from torch.nn import functional as F

from wisecli.bench.methods.weights.ft_ewc import FtEwc
from wisecli.bench.methods.weights.ft_l import FtLSettings

COARSE = FtLSettings(rate=2e-2, steps=20, stop_loss=0.5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite"])
def test_fisher_information_is_the_mean_squared_gradient_of_each_text(tmp_path: Path, architecture: str) -> None:
    texts = [*words(2, 11, 5, 5, 3, 8, seed=5), "ba"]
    bench = bench_for(tmp_path, architecture, texts)
    method = FtEwc(bench)
    site, model = method.sites[0], bench.loaded.model
    weight = site.watched(model).get_parameter("weight").requires_grad_()
    squares = []
    for text in texts[:-1]:  # one word predicts nothing
        ids = torch.tensor([bench.loaded.tokenizer(text)["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:], reduction="sum"), weight)
        squares.append((gradient.T if site.transposed else gradient).square())
    expected = torch.stack(squares).mean(0)
    torch.testing.assert_close(method.fisher, expected, atol=1e-5 * float(expected.max()), rtol=1e-3)
    assert method.weight == len(texts) - 1


def test_the_penalty_and_its_gradient(tmp_path: Path) -> None:
    method = FtEwc(bench_for(tmp_path, "llama"), weight=3.0)
    delta = torch.randn(method.fisher.shape, generator=torch.Generator().manual_seed(1))
    delta.requires_grad_()
    penalty = method.penalty(delta)
    (gradient,) = torch.autograd.grad(penalty, delta)
    expected = 1.5 * (method.fisher * delta.detach() ** 2).sum()
    torch.testing.assert_close(penalty.detach(), expected)
    torch.testing.assert_close(gradient, 3.0 * method.fisher * delta.detach())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_penalty_holds_back_what_texts_need(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    free, held = FtEwc(bench, COARSE, weight=0.0), FtEwc(bench, COARSE, weight=1e3)
    before = losses(bench)
    free.edit(EDITS[:1])
    held.edit(EDITS[:1])
    after = losses(bench, free)
    assert after[0] < 0.5 * before[0]
    assert (held.fisher * held.deltas[0] ** 2).sum() < 0.2 * (free.fisher * free.deltas[0] ** 2).sum()
    check_holds_for_every_rewriting(bench, free)


def test_there_is_no_bound(tmp_path: Path) -> None:
    method = FtEwc(bench_for(tmp_path, "llama"), FtLSettings(rate=2e-2, limit=1e-4), weight=0.0)
    method.edit(EDITS[:1])
    assert method.deltas[0].abs().max() > 1e-2
