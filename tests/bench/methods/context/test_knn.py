from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import random_rows
from support.rivals import (
    EDITS,
    TRAIN,
    require_batches_and_caches_change_nothing,
    require_untouched_outside,
    snapshot,
    tiny_bench,
    whole,
)
from support.thorough import few

from wisecli.bench.methods.base import METHODS, Bench
from wisecli.bench.methods.context import knn as module
from wisecli.bench.methods.context.knn import Datastore, Knn, KnnSettings
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, encode

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])


@torch.no_grad()
def states(bench: Bench, row: Row) -> np.ndarray:
    """What the head reads where a row's target is predicted (n, d)."""
    ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
    return bench.loaded.model.base_model(input_ids=ids).last_hidden_state[0, len(row.prompt) - 1 :].double().numpy()


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def expected(bench: Bench, knn: Knn, stored: list[Edit], row: Row) -> np.ndarray:
    """p = λ p_kNN + (1 - λ) p_LM for each target token of a row (n, V), one at a time."""
    rows = [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in stored]
    entries = [pair for one in rows for pair in zip(states(bench, one), one.target, strict=True)]
    logits = whole(bench, (*row.prompt, *row.target[:-1]))[len(row.prompt) - 1 :].double().numpy()
    found = []
    for query, plain in zip(states(bench, row), logits, strict=True):
        ranked = sorted(((((query - key) ** 2).sum(), token) for key, token in entries), key=lambda pair: pair[0])
        ranked = ranked[: knn.settings.neighbours]
        near = np.zeros(len(plain))
        for weight, (_, token) in zip(
            softmax(np.array([-d / knn.temperature for d, _ in ranked])), ranked, strict=True
        ):
            near[token] += weight
        found.append(knn.share * near + (1 - knn.share) * softmax(plain))
    return np.stack(found)


@BOTH
@pytest.mark.parametrize("neighbours", [3, 1024])
def test_probabilities_are_the_papers(tmp_path: Path, architecture: str, neighbours: int) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    knn, before = Knn(bench, KnnSettings(neighbours=neighbours)), snapshot(bench)
    row = encode(bench.loaded.tokenizer, "ba be ta te", "do fa ga")
    assert torch.equal(whole(bench, row.prompt, knn), whole(bench, row.prompt))  # nothing is stored
    knn.edit(EDITS[:1])
    knn.edit(EDITS[1:])
    for one in (row, *random_rows((4, 2), seed=5)):
        told = whole(bench, (*one.prompt, *one.target[:-1]), knn)[len(one.prompt) - 1 :].exp().numpy()
        np.testing.assert_allclose(told, expected(bench, knn, EDITS, one), atol=2e-5, rtol=2e-3)
    require_untouched_outside(bench, knn, *before)
    d = knn.store.keys.shape[1]
    assert knn.bytes() == sum(len(edit.target.split()) for edit in EDITS) * (4 * d + 8)


def test_nearest_states_by_chunks_are_the_nearest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(40, 5, generator=generator), torch.randn(6, 5, generator=generator)
    store = Datastore(5, torch.device("cpu"))
    store.add(keys[:25], torch.arange(25))
    store.add(keys[25:], torch.arange(25, 40))
    distances, tokens = store.nearest(queries, 9)
    for query, own, places in zip(queries.numpy(), distances.numpy(), tokens.numpy(), strict=True):
        all_of_them = ((keys.numpy() - query) ** 2).sum(-1)
        assert places.tolist() == np.argsort(all_of_them)[:9].tolist()
        np.testing.assert_allclose(own, np.sort(all_of_them)[:9], rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", few(["llama", "gpt2"], {"llama"}))
def test_share_and_temperature_are_the_best_of_the_grid(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    knn = METHODS["knn"](bench)
    assert isinstance(knn, Knn)
    records = [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in TRAIN]
    keys = np.concatenate([states(bench, row) for row in records])
    unit = float(((keys[:, None] - keys[None]) ** 2).sum(-1).mean())

    def right(share: float, temperature: float) -> float:
        probe = Knn(bench, KnnSettings(shares=(share,), temperatures=(temperature,)))
        assert (probe.share, probe.temperature) == (share, pytest.approx(unit * temperature, rel=1e-4))
        total = 0.0
        for edit in TRAIN:
            (apart,) = edit.locality
            for text, answer, kept in (
                (edit.prompt, edit.target, False),
                (edit.rephrases[0], edit.target, False),
                (apart.prompt, apart.answer, True),
            ):
                row = encode(bench.loaded.tokenizer, text, answer)
                plain = whole(bench, (*row.prompt, *row.target[:-1]))[len(row.prompt) - 1 :].argmax(-1).numpy()
                best = expected(bench, probe, list(TRAIN), row).argmax(-1)
                total += float(np.mean(best == (plain if kept else np.array(row.target))))
        return total

    grid = {(share, part): right(share, part) for share in knn.settings.shares for part in knn.settings.temperatures}
    chosen = next(
        pair for pair in grid if pair[0] == knn.share and pair[1] * unit == pytest.approx(knn.temperature, rel=1e-4)
    )
    assert grid[chosen] == pytest.approx(max(grid.values()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_edits_hold_and_batches_and_caches_change_nothing(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture, train=[])
    knn = Knn(bench, KnnSettings(share=0.9, temperature=0.1))
    assert knn.share == 0.9
    knn.edit(EDITS)
    edited = [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in EDITS]
    for row, one in zip(edited, target_predictions(bench.loaded, edited, knn, batch_size=2), strict=True):
        assert one.best.tolist() == list(row.target)
    require_batches_and_caches_change_nothing(bench, knn)
