from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.capturing import capture_examples
from support.helpers import Waits, hooked
from torch import Tensor, nn

from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.batched_adam import margin_loss, whiten, write_batched
from wisecli.editing.writers.target_accuracy import learnt
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded

EDITS = [
    Edit("one", "ba be bi", "do du"),
    Edit("two", "ka ke ki ko", "fa"),
    Edit("three", "ma me", "ga ge gi"),
    Edit("four", "ta te ti to tu", "la le"),
]
SETTINGS = EditSettings(passes=25, learning_rate=0.3, stop_loss=0.0)


def examples_for(loaded: Loaded, site: MatrixSite) -> list[TrainingExamples]:
    numbered, contexts = list(enumerate(EDITS)), [(0, ""), (1, "pa pe. ")]
    return capture_examples(loaded, site, numbered, contexts, batch_size=3, train_end=False)


def unrelated_for(site: MatrixSite) -> Tensor:
    return torch.randn(60, site.d_ff, generator=torch.Generator().manual_seed(11)) * 0.01


def mask_for(site: MatrixSite, kind: str, density: float = 0.5) -> Mask:
    assert kind in ("columns", "elements")
    return random_mask(site, density, "columns" if kind == "columns" else "elements", torch.Generator().manual_seed(2))


def write(
    loaded: Loaded, site: MatrixSite, mask: Mask, settings: EditSettings, told: list[Progress] | None = None
) -> Written:
    listen = (lambda progress: None) if told is None else told.append
    task = WriterTask(loaded.model, site, mask, unrelated_for(site), 1.0, settings)
    return write_batched(task, examples_for(loaded, site), listen)


def entropy_after(loaded: Loaded, site: MatrixSite, delta: Tensor) -> float:
    """Mean cross-entropy of every target token, each prompt alone through the whole model, changed in the window."""
    losses: list[Tensor] = []
    for edit in EDITS:
        prompt = loaded.tokenizer(edit.prompt)["input_ids"]
        target = loaded.tokenizer(edit.target)["input_ids"]
        start = len(prompt) - 1

        def change(_module: nn.Module, inputs: tuple[Tensor], output: Tensor, start: int = start) -> Tensor:
            changed = output.clone()
            changed[:, start:] += inputs[0][:, start:] @ delta.T
            return changed

        with torch.no_grad(), hooked(loaded.model, site, change):
            logits = loaded.model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, start:]
        losses += list(nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
    return float(torch.stack(losses).mean())


def margin(edits: list[float], unrelated: list[float], *, seed: int = 0) -> float:
    settings = EditSettings(alpha=0.25, beta=1.0, gamma=0.5)
    generator = torch.Generator().manual_seed(seed)
    return float(margin_loss(torch.tensor(edits), torch.tensor(unrelated), settings, generator))


@pytest.mark.parametrize(
    ("edits", "unrelated", "expected"),
    [
        ([2.0], [0.1], 0.0),  # everything beyond its margin
        ([2.0], [0.75], 0.5),  # unrelated .5 above α
        ([0.6], [0.0], 0.4),  # edit .4 below β
        ([1.2], [0.2, 0.2], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.75 + 0.5),  # .75 above α, .5 short of γ
        ([0.5, 1.5], [0.45], 0.2 + 0.25 + 0.225),
    ],
)
def test_the_margins_are_those_of_equation_5(edits: list[float], unrelated: list[float], expected: float) -> None:
    assert margin(edits, unrelated) == pytest.approx(expected, abs=1e-6)


def test_each_edit_is_set_against_one_unrelated_key() -> None:
    edits, unrelated = [1.0, 1.2], [0.6, 0.8, 1.1]
    fixed = sum(one - 0.25 for one in unrelated) / 3
    possible = {
        round(fixed + sum(max(0.0, 0.5 - (edit - other)) for edit, other in zip(edits, pair, strict=True)) / 2, 5)
        for pair in product(unrelated, repeat=2)
    }
    found = {round(margin(edits, unrelated, seed=seed), 5) for seed in range(40)}
    assert found <= possible
    assert len(found) > 1


def test_whitening_is_the_inverse_root_of_the_raised_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = (torch.randn(200, 7, generator=generator) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0])).double()
    white = whiten(keys)
    covariance = sum(torch.outer(key, key) for key in keys) / len(keys)
    mean = covariance.trace() / 7
    torch.testing.assert_close(white, white.T)
    raised = (covariance + 0.1 * mean * torch.eye(7, dtype=torch.float64)) / mean
    torch.testing.assert_close(white @ raised @ white, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-9)
    assert whiten(keys.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["columns", "elements"])
def test_batched_writing_lowers_the_loss_of_the_whole_model(loaded: Loaded, site: MatrixSite, kind: str) -> None:
    settings = SETTINGS
    mask = mask_for(site, kind)
    told: list[Progress] = []
    written = write(loaded, site, mask, settings, told)
    assert len(written.losses) == settings.passes
    assert [progress.step for progress in told] == list(range(1, settings.passes + 1))
    assert tuple(progress.loss for progress in told) == written.losses
    assert written.losses[-1] < 0.3 * written.losses[0]
    before = entropy_after(loaded, site, torch.zeros(site.d, site.d_ff))
    assert before > 2
    assert entropy_after(loaded, site, mask.dense(written.values)) < 0.3 * before


def test_only_the_end_of_a_pass_waits_for_the_device(loaded: Loaded, site: MatrixSite) -> None:
    settings = replace(SETTINGS, passes=1)
    with Waits() as one:
        write(loaded, site, mask_for(site, "columns"), settings)
    with Waits() as eleven:
        write(loaded, site, mask_for(site, "columns"), replace(settings, passes=11))
    read, counted = 2, len(examples_for(loaded, site))  # Adam numbers its steps on the host
    assert Counter(eleven.seen) - Counter(one.seen) == {"_local_scalar_dense": 10 * (read + counted)}


def test_what_counts_as_learnt_is_what_the_model_then_says(loaded: Loaded, site: MatrixSite) -> None:
    mask = mask_for(site, "columns")
    batches = examples_for(loaded, site)
    assert all(share < 1 for share in learnt(loaded.model, site, mask, torch.zeros(mask.shape), batches).values())
    values = write(loaded, site, mask, SETTINGS).values
    assert learnt(loaded.model, site, mask, values, batches) == dict.fromkeys(range(len(EDITS)), 1.0)


def test_training_stops_once_everything_is_learnt(loaded: Loaded, site: MatrixSite) -> None:
    told: list[Progress] = []
    written = write(loaded, site, mask_for(site, "columns"), replace(SETTINGS, passes=60, stop_loss=1.0), told)
    assert len(written.losses) < 60
    done = [progress.loss < 1.0 and progress.accuracy == 1 for progress in told]
    assert done == [False] * (len(told) - 1) + [True]


def test_the_same_seed_writes_the_same_and_another_another(loaded: Loaded, site: MatrixSite) -> None:
    settings = replace(SETTINGS, passes=4)
    mask = mask_for(site, "columns")
    first, again = write(loaded, site, mask, settings), write(loaded, site, mask, settings)
    other = write(loaded, site, mask, replace(settings, seed=1))
    assert torch.equal(first.values, again.values)
    assert first.losses == again.losses
    assert not torch.equal(first.values, other.values)


@pytest.mark.parametrize("kind", ["columns", "elements"])
def test_nothing_outside_the_mask_changes(loaded: Loaded, site: MatrixSite, kind: str) -> None:
    settings = replace(SETTINGS, passes=3)
    mask = mask_for(site, kind, density=0.2)
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    values = write(loaded, site, mask, settings).values
    assert values.shape == mask.shape
    delta = mask.dense(values)
    places = {(int(row), int(column)) for row, column in delta.nonzero()}
    every = range(site.d)
    if kind == "columns":
        allowed = {(row, column) for row in every for column in mask.indices.tolist()}
    else:
        allowed = {divmod(index, site.d_ff) for index in mask.indices.tolist()}
    assert places
    assert places <= allowed
    keys = torch.eye(site.d_ff)
    torch.testing.assert_close(mask.update(mask.restrict(keys), values), delta.T)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
