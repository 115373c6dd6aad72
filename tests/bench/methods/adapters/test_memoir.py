from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import hooked, keys_of, random_rows
from support.rivals import (
    EDITS,
    encoded,
    require_batches_like_rows,
    require_cache_changes_nothing,
    require_untouched_outside,
    snapshot,
    tiny_bench,
    whole,
)
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.adapters.memoir import Memoir, MemoirSettings, TopHash
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
# The tiny models' weights are large, so they need longer steps; and without prefixes each edit has but its own prompt.
SETTINGS = MemoirSettings(layer=2, of=5, threshold=0.9, rate=8.0, width=64, prefixes=0)


def memoir_on(directory: Path, architecture: str = "llama", settings: MemoirSettings = SETTINGS) -> Memoir:
    return Memoir(tiny_bench(directory, architecture), settings)


def columns_of(memoir: Memoir, tokens: tuple[int, ...]) -> set[int]:
    """The mask of a prompt as a set of columns, token by token."""
    bench = memoir.bench
    texts = [bench.loaded.tokenizer(text)["input_ids"] for text in bench.texts]
    usual = sum(keys_of(bench.loaded.model, memoir.site, text).mean(0) for text in texts) / len(texts)
    features = (keys_of(bench.loaded.model, memoir.site, tokens).mean(0) - usual).abs().tolist()
    largest = sorted(range(len(features)), key=lambda place: -features[place])[: round(2 / 7 * len(features))]
    return {int(memoir.hash.permutation[place]) for place in largest}


def as_set(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def test_a_mask_is_a_permutation_of_the_largest() -> None:
    found = TopHash(6, 2, seed=0)
    assert sorted(found.permutation.tolist()) == list(range(6))
    masks = found.mask(torch.tensor([[0.1, -5.0, 2.0, 0.0, 3.0, -0.2], [9.0, 0.0, 0.0, -8.0, 1.0, 1.0]]))
    assert as_set(masks[0]) == {int(found.permutation[1]), int(found.permutation[4])}
    assert as_set(masks[1]) == {int(found.permutation[0]), int(found.permutation[3])}
    assert not torch.equal(found.permutation, TopHash(6, 2, seed=1).permutation)


@BOTH
def test_an_edit_writes_the_columns_of_its_own_prompts_mask_alone(tmp_path: Path, architecture: str) -> None:
    memoir = memoir_on(tmp_path, architecture, replace(SETTINGS, prefixes=2))
    for number, edit in enumerate(EDITS):
        before = memoir.memory.clone()
        memoir.edit([edit])
        expected = columns_of(memoir, encoded(memoir.bench, edit).prompt)
        assert as_set(memoir.masks[number]) == expected
        assert as_set((memoir.memory != before).any(0)) == expected


@BOTH
def test_the_nearest_mask_is_found_by_overlap_as_sets(tmp_path: Path, architecture: str) -> None:
    memoir = memoir_on(tmp_path, architecture)
    memoir.edit(EDITS)
    known = [columns_of(memoir, encoded(memoir.bench, edit).prompt) for edit in EDITS]
    for row in random_rows((4, 1), (1, 1), (7, 1), (3, 1), seed=5):
        own = columns_of(memoir, row.prompt)
        shares = [len(own & other) / len(own) for other in known]
        mask = torch.zeros(1, memoir.site.d_ff, dtype=torch.bool)
        mask[0, list(own)] = True
        best = max(shares)
        for threshold in (best - 0.01, best + 0.01):
            memoir.settings = replace(SETTINGS, threshold=threshold)
            assert int(memoir.nearest(mask)) == (shares.index(best) if threshold < best else -1)


def opened(memoir: Memoir, row: Row, columns: set[int]) -> Tensor:
    """Mean cross-entropy of a row's target in the whole model, every token of which reads the memory's columns."""
    kept = torch.zeros(memoir.site.d_ff)
    kept[list(columns)] = 1.0

    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] * kept) @ memoir.memory.T

    with hooked(memoir.bench.loaded.model, memoir.site, hook):
        logits = whole(memoir.bench, (*row.prompt, *row.target[:-1]))[len(row.prompt) - 1 :]
    return F.cross_entropy(logits, torch.tensor(row.target))


@BOTH
def test_loss_and_its_gradient_are_the_whole_models(tmp_path: Path, architecture: str) -> None:
    memoir = memoir_on(tmp_path, architecture)
    rows, site = random_rows((3, 2), (6, 1), (4, 3), seed=5), memoir.site
    generator = torch.Generator().manual_seed(0)
    memoir.memory = 0.1 * torch.randn(site.d, site.d_ff, generator=generator)
    columns = torch.arange(0, site.d_ff, 3)
    part = capture(memoir.bench.loaded.model, site, collate(rows))
    values = memoir.memory[:, columns].clone().requires_grad_()
    loss = memoir.loss(part, part.keys[..., columns], values)
    expected = [opened(memoir, row, set(columns.tolist())) for row in rows]
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, values)
    turn, base = torch.randn(values.shape, generator=generator), memoir.memory.clone()
    ends = []
    for step in (1e-2, -1e-2):
        memoir.memory = base.clone()
        memoir.memory[:, columns] += step * turn
        ends.append(float(torch.stack([opened(memoir, row, set(columns.tolist())) for row in rows]).mean()))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float((gradient * turn).sum()), abs=2e-3, rel=0.02)


@BOTH
def test_edits_hold_and_a_shut_memory_is_the_base_model_to_the_bit(tmp_path: Path, architecture: str) -> None:
    memoir = memoir_on(tmp_path, architecture)
    bench = memoir.bench
    before = snapshot(bench)
    memoir.edit(EDITS[:3])
    memoir.edit(EDITS[3:])
    rows = [encoded(bench, edit) for edit in EDITS]
    was = target_predictions(bench.loaded, rows, batch_size=4)
    for number, (one, other) in enumerate(
        zip(target_predictions(bench.loaded, rows, memoir, batch_size=4), was, strict=True)
    ):
        assert one.losses.mean() < 0.8 * other.losses.mean()
        expected = opened(memoir, rows[number], columns_of(memoir, rows[number].prompt))
        torch.testing.assert_close(one.losses.mean(), expected, atol=1e-4, rtol=1e-3)
    for row in random_rows((5, 1), (8, 1), seed=5):
        assert torch.equal(whole(bench, row.prompt, memoir), whole(bench, row.prompt))
    require_untouched_outside(bench, memoir, *before)
    size = memoir.site.d_ff
    assert memoir.bytes() == 4 * memoir.site.d * size + len(EDITS) * size + 8 * size + 4 * size
    assert memoir.rewritten_prompt("ba") == "ba"


@BOTH
def test_every_row_of_a_batch_decides_for_itself_and_padding_does_not_count(tmp_path: Path, architecture: str) -> None:
    memoir = memoir_on(tmp_path, architecture)
    memoir.edit(EDITS)
    bench = memoir.bench
    rows = [*[encoded(bench, edit) for edit in EDITS], *random_rows((9, 2), (1, 2), (14, 1), seed=5)]
    require_batches_like_rows(bench, memoir, rows)
    together, base = (
        target_predictions(bench.loaded, rows, memoir, batch_size=7),
        target_predictions(bench.loaded, rows, batch_size=7),
    )
    changed = [not torch.equal(one.losses, other.losses) for one, other in zip(together, base, strict=True)]
    assert changed == [True] * 4 + [False] * 3
    require_cache_changes_nothing(bench, memoir, [*[row.prompt for row in rows[:4]], (5, 6, 7), (9,)], 4)


def test_the_same_prompt_has_one_mask(tmp_path: Path) -> None:
    memoir = memoir_on(tmp_path)
    memoir.edit([EDITS[0], replace(EDITS[0], target="zu"), EDITS[1]])
    assert len(memoir.masks) == 2
    (one,) = target_predictions(
        memoir.bench.loaded, [encoded(memoir.bench, replace(EDITS[0], target="zu"))], memoir, batch_size=1
    )
    (other,) = target_predictions(memoir.bench.loaded, [encoded(memoir.bench, EDITS[0])], memoir, batch_size=1)
    assert one.losses.mean() < other.losses.mean()


def test_no_step_is_longer_than_its_bound(tmp_path: Path) -> None:
    memoir = memoir_on(tmp_path, settings=replace(SETTINGS, steps=1, limit=1e-3))
    memoir.edit(EDITS[:1])
    assert float(memoir.memory.norm()) == pytest.approx(8e-3 * (64 / memoir.site.d_ff) ** 0.5, rel=1e-4)


def test_steps_are_longer_where_keys_are_shorter(tmp_path: Path) -> None:
    memoir = memoir_on(tmp_path, settings=replace(SETTINGS, steps=1, limit=1e9))
    memoir.edit(EDITS[:1])
    part = capture(memoir.bench.loaded.model, memoir.site, collate([encoded(memoir.bench, EDITS[0])]))
    columns = memoir.masks[0].nonzero().flatten()
    values = torch.zeros(memoir.site.d, len(columns), requires_grad=True)
    (gradient,) = torch.autograd.grad(memoir.loss(part, part.keys[..., columns], values), values)
    torch.testing.assert_close(memoir.memory[:, columns], -8.0 * 64 / memoir.site.d_ff * gradient)
