import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import keys_of
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses, weight_of
from support.thorough import few
from torch import Tensor
from transformers import PreTrainedModel

from wisecli.bench.methods.base import METHODS, UnsuitableError
from wisecli.bench.methods.weights.memit import Memit, MemitSettings, spread
from wisecli.bench.methods.weights.rome_common import read_fact
from wisecli.bench.methods.weights.weight_editing import second_moment
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.hooks import hooked

# The tiny models' layers 1 to 3, and texts that weigh no more than the edits.
THREE = MemitSettings(first=1, last=3, of=5, weight=2.0)
ARCHITECTURES = few(("llama", "gpt2", "granite", "gptj"), ("gpt2", "granite"))


def places(method: Memit, edit: Edit) -> list[tuple[list[int], int]]:
    """Tokens of an edit's prompt under each prefix, and the place of its subject's last token."""
    tokenizer = method.bench.loaded.tokenizer
    found = []
    for prefix in method.prefixes:
        length = len(tokenizer(prefix)["input_ids"]) if prefix else 0
        found.append((tokenizer(prefix + edit.prompt)["input_ids"], length + 2))  # subjects are words 1 and 2
    return found


@torch.no_grad()
def leaving(model: PreTrainedModel, layer: int, tokens: list[int]) -> Tensor:
    """What leaves a layer (T, d): for all but the last, the next one's input."""
    return model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[layer + 1][0]


def add_to(model: PreTrainedModel, site: MatrixSite, delta: Tensor) -> None:
    weight_of(model, site).data.add_(delta)


def test_the_solution_is_that_of_least_squares_over_old_and_new_keys() -> None:
    generator = torch.Generator().manual_seed(2)
    old, new, matrix, residuals = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 13), (5, 13), (7, 13), (5, 7))
    )
    delta = spread(residuals.float(), new.float(), torch.linalg.cholesky(old.T @ old)).double()
    keys = torch.cat([old, new]).numpy()
    values = torch.cat([old @ matrix.T, new @ matrix.T + residuals]).numpy()
    expected = np.linalg.lstsq(keys, values, rcond=None)[0].T
    torch.testing.assert_close(matrix + delta, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    # Normal equations; and keys that are zero in the edits' directions do not move.
    torch.testing.assert_close(delta @ (old.T @ old + new.T @ new), residuals.T @ new, atol=1e-4, rtol=1e-4)
    turned = torch.linalg.solve(old.T @ old, new.T)
    off = torch.linalg.svd(turned, full_matrices=True).U[:, 5:]
    assert (delta @ off).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_solves_its_normal_equations(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = Memit(bench, THREE)
    assert [site.layer for site in method.sites] == [1, 2, 3]
    targets = [method.target(read_fact(bench, edit, method.prefixes)) for edit in EDITS]
    method.edit(EDITS)
    model = copy.deepcopy(bench.loaded.model)
    for place, (site, found) in enumerate(zip(method.sites, method.deltas, strict=True)):
        keys, residuals = [], []
        for edit, target in zip(EDITS, targets, strict=True):
            spots = places(method, edit)
            keys.append(torch.stack([keys_of(model, site, tokens)[at] for tokens, at in spots]).mean(0))
            tokens, at = spots[0]
            missing = target - leaving(model, method.sites[-1].layer, tokens)[at]
            residuals.append(missing / (len(method.sites) - place) / site.multiplier)
        known, wanted = torch.stack(keys).double(), torch.stack(residuals).double()
        moment = THREE.weight * second_moment(bench, site)
        left = found.double() @ (moment + known.T @ known)
        right = wanted.T @ known
        assert (left - right).norm() < 1e-4 * right.norm()
        expected = np.linalg.solve((moment + known.T @ known).numpy(), right.T.numpy()).T
        assert (found.double() - torch.tensor(expected)).norm() < 1e-4 * np.linalg.norm(expected)
        add_to(model, site, found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_target_is_found_as_by_adam_through_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    search = replace(THREE.search, steps=6, rate=0.2, essence=0.5)
    method = Memit(bench, replace(THREE, search=search))
    method.edit(EDITS[:1])
    edit = EDITS[1]
    target = method.target(read_fact(bench, edit, method.prefixes))
    model, tokenizer, top = bench.loaded.model, bench.loaded.tokenizer, method.sites[-1]
    essence = tokenizer(f"{edit.subject} is a")["input_ids"]

    def logits(tokens: list[int], at: int, change: Tensor) -> Tensor:
        def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, at] += change
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with hooked(model.get_submodule(top.layer_module).register_forward_hook(hook)):
            return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def objective(change: Tensor) -> Tensor:
        losses = []
        for prefix, (tokens, at) in zip(method.prefixes, places(method, edit), strict=True):
            row = encode(tokenizer, prefix + edit.prompt, edit.target)
            logs = logits([*tokens, *row.target[:-1]], at, change)[len(tokens) - 1 :].log_softmax(-1)
            losses += [-logs[place, token] for place, token in enumerate(row.target)]
        was, now = (logits(essence, 1, moved)[-1].softmax(-1) for moved in (torch.zeros(()), change))
        size = change.norm() if change.any() else torch.zeros(())
        return torch.stack(losses).mean() + 0.5 * (now * (now / was).log()).sum() + 0.5 * size / length**2

    with method.applied():
        tokens, at = places(method, edit)[0]
        start = leaving(model, top.layer, tokens)[at]
        length = start.norm()
        change = torch.zeros(top.d, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=search.rate)
        for _ in range(search.steps):
            optimizer.zero_grad()
            objective(change).backward()
            optimizer.step()
            change.data *= min(1.0, float(search.limit * length / change.data.norm()))
    assert (target - start).norm() > 0.1
    assert (target - start - change.detach()).norm() < 1e-3 * (target - start).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_texts_hardly_weigh_the_target_is_what_leaves_the_layer(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = Memit(bench, replace(THREE, weight=1e-6, prefixes=0))
    assert method.prefixes == [""]
    target = method.target(read_fact(bench, EDITS[0], method.prefixes))
    method.edit(EDITS[:1])
    tokens, at = places(method, EDITS[0])[0]
    with method.applied():
        got = leaving(bench.loaded.model, 3, tokens)[at]
    torch.testing.assert_close(got, target, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_takes(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = Memit(bench, replace(THREE, weight=0.1, search=replace(THREE.search, limit=5.0)))
    before = losses(bench)
    method.edit(EDITS[:1])
    after = losses(bench, method)
    assert after[0] < before[0] - 0.5
    method.edit(EDITS[1:])
    assert method.bytes() == 4 * sum(delta.numel() for delta in method.deltas)
    check_holds_for_every_rewriting(bench, method)


def test_a_stream_is_its_edits_one_by_one_and_a_mass_is_not(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    stream, single, mass = METHODS["memit"](bench), METHODS["memit-mass"](bench), METHODS["memit-mass"](bench)
    stream.edit(EDITS)
    for edit in EDITS:
        single.edit([edit])
    mass.edit(EDITS)
    assert isinstance(stream, Memit)
    assert isinstance(single, Memit)
    assert isinstance(mass, Memit)
    assert all(map(torch.equal, stream.deltas, single.deltas))
    assert not any(map(torch.equal, stream.deltas, mass.deltas))
    before = [delta.clone() for delta in mass.deltas]
    mass.edit([])
    assert all(map(torch.equal, mass.deltas, before))


def test_what_it_is_not_for(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableError, match="texts"):
        Memit(bench_for(tmp_path / "bare", "llama", []))
    with pytest.raises(UnsuitableError, match="norm"):
        Memit(bench_for(tmp_path / "normed", "gemma2"))
