from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.rewriting import EDITS, bench_for, weight_of
from support.thorough import few

import wisecli.bench.methods.weights.ft_ewc
import wisecli.bench.methods.weights.memit
import wisecli.bench.methods.weights.rome  # noqa: F401  # each puts its methods into the table
from wisecli.bench.methods.base import METHODS, Bench, UnsuitableError
from wisecli.bench.methods.weights.weight_editing import WeightEditing, at_depth
from wisecli.config import LoadOptions
from wisecli.models.loading import load_model
from wisecli.progress import Event

NAMES = ("ft-l", "ft-ewc", "rome", "memit", "memit-mass")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_changes_are_added_as_the_matrix_is_stored(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    sites = [bench.site(0), bench.site(3)]
    method = WeightEditing(bench, sites)
    before = [weight_of(bench.loaded.model, site).clone() for site in sites]
    generator = torch.Generator().manual_seed(6)
    method.deltas = [torch.randn(site.d, site.d_ff, generator=generator) for site in sites]
    with method.applied():
        for site, base, delta in zip(sites, before, method.deltas, strict=True):
            assert torch.equal(weight_of(bench.loaded.model, site), base + delta)
        with method.applied(2):
            assert torch.equal(weight_of(bench.loaded.model, sites[0]), before[0] + method.deltas[0])
    for site, base in zip(sites, before, strict=True):
        assert torch.equal(weight_of(bench.loaded.model, site), base)
    assert method.bytes() == 2 * 4 * sites[0].d * sites[0].d_ff


@pytest.mark.parametrize(
    ("name", "architecture"), few(product(NAMES, ["llama", "gpt2"]), {*product(NAMES, ["gpt2"]), ("rome", "llama")})
)
def test_in_half_precision(tmp_path: Path, name: str, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = METHODS[name](
        replace(bench, loaded=load_model(tmp_path, load=LoadOptions(device="cpu", dtype="bfloat16")))
    )
    method.edit(EDITS[:2])
    assert isinstance(method, WeightEditing)
    assert all(delta.dtype == torch.float32 and delta.isfinite().all() and delta.any() for delta in method.deltas)
    with method.applied():
        weight = weight_of(method.bench.loaded.model, method.sites[0])
        assert weight.dtype == torch.bfloat16
        assert (weight.float() - method.matrix(0)).abs().max() <= 2**-8 * weight.abs().max()


@pytest.mark.parametrize("name", few(NAMES, ("ft-l", "memit")))
def test_who_watches_is_told_of_every_edit(tmp_path: Path, name: str) -> None:
    told: list[Event] = []
    bench = replace(bench_for(tmp_path, "llama"), on_progress=told.append)
    METHODS[name](bench).edit(EDITS)
    assert [(event.done, event.total) for event in told[-len(EDITS) :]] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("name", NAMES)
def test_streamed_layers_are_refused(tmp_path: Path, name: str) -> None:
    bench = bench_for(tmp_path, "llama")
    save_tiny(tmp_path / "streamed", "llama")
    loaded = load_model(tmp_path / "streamed", load=LoadOptions(device="cpu", memory_budget=60_000))
    assert loaded.stream is not None
    streamed = Bench(loaded, bench.checkpoint, bench.layout, (), bench.texts)
    with pytest.raises(UnsuitableError, match="streamed"):
        METHODS[name](streamed)


def test_depths(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    assert [at_depth(bench, layer, 48).layer for layer in (0, 4, 5, 17, 30, 47, 48)] == [0, 0, 1, 2, 3, 3, 3]
