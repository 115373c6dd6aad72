import random
from pathlib import Path

import pytest
import torch
from support.helpers import hooked, keys_of, random_rows
from support.rivals import (
    EDITS,
    encoded,
    require_batches_and_caches_change_nothing,
    require_untouched_outside,
    snapshot,
    tiny_bench,
    whole,
)
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.adapters.grace import Codebook, Grace, GraceSettings
from wisecli.bench.methods.base import METHODS
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
NARROW = GraceSettings(depth=0.2, radius=0.05)


def grace_on(directory: Path, architecture: str, settings: GraceSettings = NARROW) -> Grace:
    return Grace(tiny_bench(directory, architecture), settings)


def replaced(grace: Grace, row: Row, value: Tensor) -> Tensor:
    """Mean cross-entropy of a row's target where the whole model runs with the value in place."""

    def hook(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, : len(row.prompt) - 1], value[None, None], output[:, len(row.prompt) :]], 1)

    with hooked(grace.bench.loaded.model, grace.site, hook):
        logits = whole(grace.bench, (*row.prompt, *row.target[:-1]))[len(row.prompt) - 1 :]
    return F.cross_entropy(logits, torch.tensor(row.target))


@pytest.mark.parametrize("seed", range(20))
def test_the_papers_rules_key_by_key(seed: int) -> None:
    draw = random.Random(seed)
    book = Codebook(2, 3, 1.0, torch.device("cpu"), 0)
    entries: list[tuple[complex, float, int]] = []
    for _ in range(25):
        point, label = complex(draw.uniform(0, 6), draw.uniform(0, 6)), draw.randrange(3)
        book.insert(torch.tensor([point.real, point.imag]), (label,))
        place = min(range(len(entries)), key=lambda index: abs(entries[index][0] - point), default=None)
        if place is None or abs(entries[place][0] - point) > 1 + entries[place][1]:
            entries.append((point, 1.0, label))
            continue
        key, radius, owner = entries[place]
        distance = abs(key - point)
        if owner == label:
            entries[place] = (key, max(radius, distance), owner)
        else:
            entries[place] = (key, distance / 2, owner)
            entries.append((point, distance / 2, label))
    assert book.targets == [(label,) for *_, label in entries]
    assert book.radii.tolist() == pytest.approx([radius for _, radius, _ in entries], abs=1e-4)
    probes = [complex(draw.uniform(0, 6), draw.uniform(0, 6)) for _ in range(50)]
    found = book.lookup(torch.tensor([[probe.real, probe.imag] for probe in probes])).tolist()
    for probe, entry in zip(probes, found, strict=True):
        nearest = min(range(len(entries)), key=lambda index: abs(entries[index][0] - probe))
        margin = abs(entries[nearest][0] - probe) - entries[nearest][1]
        assert abs(margin) < 1e-3 or entry == (nearest if margin < 0 else -1)


def test_a_fact_told_anew_takes_its_entry_over() -> None:
    book = Codebook(2, 3, 1.0, torch.device("cpu"), 0)
    key = torch.tensor([1.0, 2.0])
    assert book.insert(key, (1,)) == book.insert(key, (2,)) == 0
    assert book.targets == [(2,)]
    assert book.radii.tolist() == [1.0]


@BOTH
def test_losses_and_their_gradient_are_the_whole_models(tmp_path: Path, architecture: str) -> None:
    grace = grace_on(tmp_path / "model", architecture)
    rows = random_rows((3, 2), (6, 1), (4, 3), seed=5)
    part = capture(grace.bench.loaded.model, grace.site, collate(rows)).from_window()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, grace.site.d, generator=generator).requires_grad_()
    output = grace.site.watched(grace.bench.loaded.model)(part.keys[:, 0])
    losses = grace.losses(part, output, values)
    torch.testing.assert_close(
        losses, torch.stack([replaced(grace, *pair) for pair in zip(rows, values, strict=True)]), atol=1e-5, rtol=1e-5
    )
    losses.sum().backward()
    direction = torch.randn(values.shape, generator=generator)
    for row, value, turn, gradient in zip(rows, values.detach(), direction, values.grad, strict=True):
        step = 1e-2
        rise = replaced(grace, row, value + step * turn) - replaced(grace, row, value - step * turn)
        assert float(rise / (2 * step)) == pytest.approx(float(gradient @ turn), abs=2e-3, rel=0.02)


@BOTH
def test_edits_hold_and_all_else_is_untouched_to_the_bit(tmp_path: Path, architecture: str) -> None:
    grace = grace_on(tmp_path / "model", architecture)
    before = snapshot(grace.bench)
    grace.edit(EDITS[:3])
    grace.edit(EDITS[3:])
    rows = [encoded(grace.bench, edit) for edit in EDITS]
    assert len(grace.codebook.targets) == len(EDITS)
    was = target_predictions(grace.bench.loaded, rows, batch_size=4)
    for row, one, other in zip(
        rows, target_predictions(grace.bench.loaded, rows, grace, batch_size=4), was, strict=True
    ):
        # Random layers attend to next to nothing: what stands at one token hardly reaches the one after it.
        assert one.best[0] == row.target[0]
        assert one.losses.mean() < 0.6 * other.losses.mean()
    for row in random_rows((5, 1), (8, 1), seed=5):
        assert torch.equal(whole(grace.bench, row.prompt, grace), whole(grace.bench, row.prompt))
    require_untouched_outside(grace.bench, grace, *before)
    assert grace.bytes() == 4 * len(EDITS) * (grace.site.d_ff + grace.site.d + 1)
    assert grace.rewritten_prompt("ba") == "ba"


@BOTH
def test_keys_are_the_prompts_last_and_values_stand_only_there(tmp_path: Path, architecture: str) -> None:
    grace = grace_on(tmp_path / "model", architecture)
    grace.edit(EDITS)
    for edit, key, value in zip(EDITS, grace.codebook.keys, grace.codebook.values, strict=True):
        row = encoded(grace.bench, edit)
        torch.testing.assert_close(keys_of(grace.bench.loaded.model, grace.site, row.prompt)[-1], key)
        (one,) = target_predictions(grace.bench.loaded, [row], grace, batch_size=1)
        torch.testing.assert_close(one.losses.mean(), replaced(grace, row, value), atol=1e-4, rtol=1e-3)


def test_a_later_target_of_the_same_prompt_is_the_one_that_holds(tmp_path: Path) -> None:
    grace = grace_on(tmp_path / "model", "llama")
    later = Edit("later", EDITS[0].prompt, "zu")
    grace.edit([EDITS[0], later])
    (one,) = target_predictions(grace.bench.loaded, [encoded(grace.bench, later)], grace, batch_size=1)
    assert one.best.tolist() == list(encoded(grace.bench, later).target)
    assert len(grace.codebook.targets) == 1


def test_prompts_of_one_target_share_an_entry(tmp_path: Path) -> None:
    grace = grace_on(tmp_path / "model", "llama", GraceSettings(radius=50.0))
    same = [Edit("a", "ba be bi", "do"), Edit("b", "ka ke ki", "do")]
    grace.edit(same)
    rows = [encoded(grace.bench, edit) for edit in same]
    assert len(grace.codebook.targets) == 1
    assert [one.best.tolist() for one in target_predictions(grace.bench.loaded, rows, grace, batch_size=2)] == [
        [*rows[0].target]
    ] * 2


@BOTH
def test_batches_and_caches_change_nothing(tmp_path: Path, architecture: str) -> None:
    grace = grace_on(tmp_path / "model", architecture)
    grace.edit(EDITS)
    require_batches_and_caches_change_nothing(grace.bench, grace)


def test_layer_and_settings_are_the_authors(tmp_path: Path) -> None:
    grace = METHODS["grace"](tiny_bench(tmp_path / "model"))
    assert isinstance(grace, Grace)
    assert grace.site.layer == 3  # as 27 of 32 would be the last layer of five, and one must stay above
    assert grace.settings.radius == grace.settings.rate == 1.0
    assert grace.bytes() == 0
