from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import keys_of
from support.rewriting import (
    EDITS,
    bench_for,
    check_holds_for_every_rewriting,
    gradients_of,
    losses,
    rows_of,
    weight_of,
)
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.weights.crispedit import CrispEdit, CrispEditSettings, Curvature
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import capture

# The tiny models' layers 1 to 3; their weights are large, so they need longer steps.
THREE = CrispEditSettings(first=1, last=3, of=5, energy=0.5, rate=2e-2, stop=1.0)
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 1) -> Curvature:
    """Factors of a matrix of 3 rows and 4 columns; directions that are seen more and less."""
    site = MatrixSite("llama", 0, "layer", "layer.value", False, 3, 4)
    curvature = Curvature(site, torch.device("cpu"))
    keys, gradients = drawn(20, 4, seed=seed), drawn(20, 3, seed=seed + 1)
    curvature.add(keys[:7] * torch.tensor([3.0, 1.0, 0.5, 0.1]), gradients[:7] * torch.tensor([2.0, 1.0, 0.2]))
    curvature.add(keys[7:] * torch.tensor([3.0, 1.0, 0.5, 0.1]), gradients[7:] * torch.tensor([2.0, 1.0, 0.2]))
    return curvature


def kronecker(curvature: Curvature, energy: float) -> tuple[Tensor, int]:
    """The projection as a matrix (d · d_ff, d · d_ff) from the eigenvectors of ``B ⊗ A``, and how many are closed."""
    whole = torch.kron(curvature.gradients / curvature.tokens, curvature.inputs / curvature.tokens)
    sizes, directions = torch.linalg.eigh(whole)
    sizes, directions = sizes.flip(0), directions.flip(1)
    total, closed = 0.0, 0
    while total < energy * float(sizes.sum()):
        total += float(sizes[closed])
        closed += 1
    return directions[:, closed:] @ directions[:, closed:].T, closed


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_the_projection_is_that_of_the_whole_kronecker_product(energy: float) -> None:
    curvature = small()
    found = curvature.projection(energy)
    whole, closed = kronecker(curvature, energy)
    assert 0 < closed == int((found.free == 0).sum())
    gradient = drawn(3, 4, seed=5)
    expected = (whole @ gradient.double().flatten()).view(3, 4).float()
    torch.testing.assert_close(found(gradient), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found(found(gradient)), found(gradient), atol=1e-5, rtol=1e-5)


def test_with_all_the_curvature_closed_next_to_nothing_is_left() -> None:
    found = small().projection(1.0)
    gradient = drawn(3, 4, seed=5)
    assert found(gradient).norm() < gradient.norm()
    assert int(found.free.sum()) <= 1


@BOTH
def test_factors_are_those_of_every_token_in_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = CrispEdit(bench, THREE)
    model = bench.loaded.model
    for site, curvature in zip(method.sites, method.curvatures, strict=True):
        inputs, outputs, count = torch.zeros(site.d_ff, site.d_ff), torch.zeros(site.d, site.d), 0
        for text in bench.texts:
            tokens = bench.loaded.tokenizer(text)["input_ids"]
            gradients = gradients_of(model, site, tokens[:-1], tokens[1:])
            keys = keys_of(model, site, tokens)
            for place in range(len(tokens) - 1):
                inputs += torch.outer(keys[place], keys[place])
                outputs += torch.outer(gradients[place], gradients[place])
                count += 1
        assert curvature.tokens == count
        torch.testing.assert_close(curvature.inputs.float(), inputs, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(curvature.gradients.float(), outputs, atol=1e-4, rtol=1e-3)


@BOTH
def test_loss_and_gradients_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method, model = CrispEdit(bench, THREE), bench.loaded.model
    deltas = [0.05 * drawn(site.d, site.d_ff, seed=site.layer) for site in method.sites]
    part = capture(model, method.sites[0], collate(rows_of(bench)))
    loss, gradients = method.gradients(part, deltas)
    method.deltas = deltas
    with method.applied():
        weights = [site.watched(model).get_parameter("weight").requires_grad_() for site in method.sites]
        losses = []
        for row in rows_of(bench):
            logits = model(torch.tensor([[*row.prompt, *row.target[:-1]]]), use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits[len(row.prompt) - 1 :], torch.tensor(row.target)))
        whole = torch.stack(losses).mean()
        expected = torch.autograd.grad(whole, weights)
        for weight in weights:
            weight.requires_grad_(False)
    assert loss == pytest.approx(float(whole.detach()), abs=1e-4)
    for site, found, gradient in zip(method.sites, gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient.T if site.transposed else gradient, atol=1e-5, rtol=1e-3)


@BOTH
def test_edits_take(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = CrispEdit(bench, THREE)
    before = losses(bench)
    method.edit(EDITS)
    after = losses(bench, method)
    assert sum(after) < 0.6 * sum(before)
    check_holds_for_every_rewriting(bench, method)


def test_the_first_step_is_adams_on_the_projected_gradient(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = CrispEdit(bench, replace(THREE, passes=1))
    part = capture(bench.loaded.model, method.sites[0], collate(rows_of(bench)))
    _, gradients = method.gradients(part, method.deltas)
    expected = [
        -THREE.rate * curvature.projection(THREE.energy)(gradient).sign()
        for curvature, gradient in zip(method.curvatures, gradients, strict=True)
    ]
    method.edit(EDITS)
    for delta, wanted in zip(method.deltas, expected, strict=True):
        # Adam's first step is of one length for every weight; those of no gradient to speak of go either way.
        assert float((delta - wanted).abs().gt(1e-4).float().mean()) < 0.01


def test_later_edits_spare_the_earlier_ones(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = CrispEdit(bench, THREE)
    texts = method.curvatures[0].tokens
    method.edit(EDITS[:2])
    assert method.curvatures[0].tokens == texts
    with method.applied():
        keys = [keys_of(bench.loaded.model, method.sites[2], [*row.prompt, *row.target]) for row in rows_of(bench)[:2]]
    seen = method.curvatures[2].inputs.clone()
    method.edit(EDITS[2:])
    read = torch.cat([own[:-1] for own in keys])
    assert method.curvatures[0].tokens == texts + len(read)
    torch.testing.assert_close((method.curvatures[2].inputs - seen).float(), read.T @ read, atol=1e-3, rtol=1e-3)


def test_no_edits_change_nothing(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = CrispEdit(bench, THREE)
    method.edit([])
    assert not any(delta.any() for delta in method.deltas)
    assert torch.equal(method.matrix(0), weight_of(bench.loaded.model, method.sites[0]))
