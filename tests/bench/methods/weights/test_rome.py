from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import keys_of
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses, rows_of, weight_of
from support.thorough import few
from torch import Tensor, nn

from wisecli.bench.methods.evaluation import target_predictions
from wisecli.bench.methods.weights.rome import SEARCH, Rome, rank_one
from wisecli.bench.methods.weights.rome_common import read_fact
from wisecli.bench.methods.weights.weight_editing import second_moment
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.hooks import hooked

ARCHITECTURES = few(("llama", "gpt2", "gemma2", "granite"), ("gpt2", "gemma2", "granite"))


def random_problem(d: int = 7, d_ff: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix, a key, a value and a second moment."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(40, d_ff, generator=generator, dtype=torch.float64)
    draws = [torch.randn(*shape, generator=generator) for shape in ((d, d_ff), (d_ff,), (d,))]
    return draws[0], draws[1], draws[2], rows.T @ rows / 40


def standing(module: nn.Module, column: int, value: Tensor) -> AbstractContextManager[None]:
    """The matrix gives ``value`` (and its bias) at one column."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        changed = output.clone()
        changed[:, column] = value if bias is None else value + bias
        return changed

    return hooked(module.register_forward_hook(hook))


def test_the_least_change_that_turns_the_key_into_the_value() -> None:
    matrix, key, value, moment = random_problem()
    delta = rank_one(matrix, key, value, torch.linalg.cholesky(moment))
    torch.testing.assert_close((matrix + delta) @ key, value, atol=1e-5, rtol=1e-5)
    # min tr(Δ C Δᵀ) subject to Δ k = r, each row by its Lagrange system.
    width = len(key)
    system = np.block([[moment.numpy(), key.double().numpy()[:, None]], [key.double().numpy()[None], np.zeros((1, 1))]])
    missing = (value - matrix @ key).double().numpy()
    expected = [np.linalg.solve(system, np.append(np.zeros(width), share))[:width] for share in missing]
    torch.testing.assert_close(delta.double(), torch.tensor(np.array(expected)), atol=1e-5, rtol=1e-4)


def test_keys_off_the_direction_do_not_move() -> None:
    matrix, key, value, moment = random_problem()
    delta = rank_one(matrix, key, value, torch.linalg.cholesky(moment))
    direction = torch.linalg.solve(moment, key.double())
    others = torch.randn(20, len(key), generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    others -= (others @ direction / (direction @ direction))[:, None] * direction
    assert (others.float() @ delta.T).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(delta) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_second_moment_of_every_token(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    site = bench.site(1)
    texts = [bench.loaded.tokenizer(text)["input_ids"] for text in bench.texts]
    keys = torch.cat([keys_of(bench.loaded.model, site, tokens) for tokens in texts]).double().numpy()
    expected = keys.T @ keys / len(keys)
    expected += 0.01 * np.sort(np.diag(expected))[(site.d_ff - 1) // 2] * np.eye(site.d_ff)
    torch.testing.assert_close(second_moment(bench, site), torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_key_gives_the_value_after_each_edit_of_a_stream(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = Rome(bench)
    site, tokenizer = method.sites[0], bench.loaded.tokenizer
    moment = second_moment(bench, site)
    for edit in EDITS[:2]:
        _, value = method.pair(read_fact(bench, edit, method.prefixes))
        before = method.deltas[0]
        method.edit([edit])
        assert edit.subject is not None
        seen = []
        for prefix in method.prefixes:
            length = len(tokenizer(prefix)["input_ids"]) if prefix else 0
            tokens = encode(tokenizer, prefix + edit.prompt, edit.target).prompt
            seen.append(keys_of(bench.loaded.model, site, tokens)[length + 2])  # subjects are words 1 and 2
        key = torch.stack(seen).mean(0)
        with method.applied():
            got = weight_of(bench.loaded.model, site) @ key
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-4)
        change = method.deltas[0] - before
        off = torch.randn(20, site.d_ff, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction = torch.linalg.solve(moment, key.double())
        off -= (off @ direction / (direction @ direction))[:, None] * direction
        assert (off.float() @ change.T).abs().max() < 1e-4 * change.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_value_is_found_as_by_adam_through_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    search = replace(SEARCH, steps=6, rate=0.2, essence=0.5, limit=1.5)
    method = Rome(bench, search)
    method.edit(EDITS[:1])
    edit, (key, value) = EDITS[1], method.pair(read_fact(bench, EDITS[1], method.prefixes))
    model, tokenizer = bench.loaded.model, bench.loaded.tokenizer
    module, rows = method.sites[0].watched(model), []
    for prefix in method.prefixes:
        rows.append((encode(tokenizer, prefix + edit.prompt, edit.target), len(tokenizer(prefix or "?")["input_ids"])))
    essence = torch.tensor([tokenizer(f"{edit.subject} is a")["input_ids"]])

    def objective(vector: Tensor, start: Tensor) -> Tensor:
        losses = []
        for row, length in rows:
            with standing(module, length + 2, vector):
                logits = model(input_ids=torch.tensor([[*row.prompt, *row.target[:-1]]]), use_cache=False).logits[0]
            logs = logits[len(row.prompt) - 1 :].log_softmax(-1)
            losses += [-logs[place, token] for place, token in enumerate(row.target)]
        was = model(input_ids=essence, use_cache=False).logits[0, -1].softmax(-1)
        with standing(module, 1, vector):
            now = model(input_ids=essence, use_cache=False).logits[0, -1].softmax(-1)
        divergence = (now * (now / was).log()).sum()
        size = (vector - start).norm() if not torch.equal(vector, start) else torch.zeros(())
        return torch.stack(losses).mean() + 0.5 * divergence + search.decay * size / start.square().sum()

    with method.applied():
        start = (weight_of(model, method.sites[0]) @ key).detach()
        vector = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([vector], lr=search.rate)
        for _ in range(search.steps):
            optimizer.zero_grad()
            objective(vector, start).backward()
            optimizer.step()
            far = vector.data - start
            vector.data = start + far * min(1.0, float(search.limit * start.norm() / far.norm()))
    assert (value - start).norm() > 0.1
    assert (value - vector.detach()).norm() < 1e-3 * (value - start).norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_takes(tmp_path: Path, architecture: str) -> None:
    bench = bench_for(tmp_path, architecture)
    method = Rome(bench)
    before = losses(bench)
    method.edit(EDITS[:1])
    after = losses(bench, method)
    assert after[0] < before[0] - 0.3
    assert method.bytes() == 4 * method.deltas[0].numel()
    method.edit(EDITS[1:])
    check_holds_for_every_rewriting(bench, method)


def test_edits_without_a_subject_are_written_at_the_prompts_end(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = Rome(bench)
    edit = Edit("bare", EDITS[0].prompt, EDITS[0].target)
    key, _ = method.pair(read_fact(bench, edit, [""]))
    tokens = bench.loaded.tokenizer(edit.prompt)["input_ids"]
    torch.testing.assert_close(key, keys_of(bench.loaded.model, method.sites[0], tokens)[-1], atol=1e-5, rtol=1e-4)
    before = target_predictions(bench.loaded, rows_of(bench)[:1], batch_size=1)[0].losses.mean()
    method.edit([edit])
    assert target_predictions(bench.loaded, rows_of(bench)[:1], method, batch_size=1)[0].losses.mean() < before - 0.3


def test_a_subject_that_opens_the_prompt(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "llama")
    method = Rome(bench)
    opening = EDITS[0].prompt.split()[0]
    fact = read_fact(bench, replace(EDITS[0], subject=opening), [""])
    assert int(fact.columns.min()) == 0
    key, value = method.pair(fact)
    tokens = bench.loaded.tokenizer(EDITS[0].prompt)["input_ids"]
    torch.testing.assert_close(key, keys_of(bench.loaded.model, method.sites[0], tokens)[0], atol=1e-5, rtol=1e-4)
    assert (value - method.matrix(0) @ key).norm() > 0.1
