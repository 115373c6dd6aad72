from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from support.helpers import hooked, site_of
from torch import Tensor, nn

from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings, Pooling
from wisecli.editing.examples.training_examples import TrainingExamples, capture_groups
from wisecli.editing.writers.edit_pass import single_pass
from wisecli.editing.writers.paper_sgd import margins, with_changed_mask, write_sequential
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded

EDITS = [Edit("one", "ba be bi", "do du"), Edit("two", "ka ke ki ko", "fa"), Edit("three", "ma me", "ga ge gi")]
CONTEXTS = ((0, ""), (1, "pa pe. "))
UNRELATED = "ta te ti to tu"
SETTINGS = EditSettings(
    writer="gradient",
    schedule="sequential",
    passes=12,
    learning_rate=1.0,
    stop_loss=0.0,
    alpha=0.1,
    beta=0.5,
    gamma=0.3,
    pooling="mean",
)


def mask_for(site: MatrixSite, density: float = 0.5) -> Mask:
    return random_mask(site, density, "elements", torch.Generator().manual_seed(2))


def keys_in(loaded: Loaded, site: MatrixSite, text: str) -> Tensor:
    """Keys (t, d_ff) of a text, read off the whole model."""
    read: list[Tensor] = []
    handle = site.watched(loaded.model).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0]))
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]]), use_cache=False)
    handle.remove()
    return read[0]


def write(
    loaded: Loaded,
    site: MatrixSite,
    settings: EditSettings = SETTINGS,
    *,
    edits: list[Edit] = EDITS,
    told: list[Progress] | None = None,
    density: float = 0.5,
    start: Written | None = None,
) -> Written:
    groups = [([one], CONTEXTS, ()) for one in enumerate(edits)]
    whole = settings.pooling != "mean"
    found = capture_groups(loaded, site, groups, batch_size=32, train_end=False, window=whole)
    batches: list[TrainingExamples] = [examples for group in found for examples in group]
    task = task_for(loaded, site, settings, density)
    listen = (lambda progress: None) if told is None else told.append
    other = keys_in(loaded, site, UNRELATED)
    return write_sequential(task, [single_pass(settings, examples, other) for examples in batches], listen, start=start)


def task_for(loaded: Loaded, site: MatrixSite, settings: EditSettings, density: float = 0.5) -> WriterTask:
    matrix = site.watched(loaded.model).get_parameter("weight").detach()
    unrelated = torch.zeros(1, site.d_ff)
    return WriterTask(loaded.model, site, mask_for(site, density), unrelated, 1.0, settings, matrix)


def rows_of(loaded: Loaded, edit: Edit) -> list[tuple[list[int], list[int]]]:
    """Prompt and target tokens in both contexts."""
    target = loaded.tokenizer(edit.target)["input_ids"]
    return [(loaded.tokenizer(context + edit.prompt)["input_ids"], target) for _, context in CONTEXTS]


def loss_of_whole_model(loaded: Loaded, site: MatrixSite, edit: Edit, delta: Tensor, settings: EditSettings) -> Tensor:
    """The loss of one edit, each row alone through the whole model, changed at every token."""
    losses: list[Tensor] = []
    called: list[Tensor] = []

    def moved(main: Tensor, update: Tensor) -> Tensor:
        behind = settings.norm_of == "activated"
        change = nn.functional.silu(main + update) - nn.functional.silu(main) if behind else update
        return torch.linalg.vector_norm(change, dim=-1).mean()

    def change(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        update = inputs[0] @ delta.T
        called.append(moved(output, update))
        return output + update

    for prompt, target in rows_of(loaded, edit):
        with hooked(loaded.model, site, change):
            logits = loaded.model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0]
        each = nn.functional.cross_entropy(logits[len(prompt) - 1 :], torch.tensor(target), reduction="sum")
        losses.append(each / (len(target) + 1))
    unrelated = keys_in(loaded, site, UNRELATED)
    other = moved(unrelated @ site.watched(loaded.model).get_parameter("weight").T, unrelated @ delta.T)
    return torch.stack(losses).mean() + margins(torch.stack(called), other, settings)


@pytest.mark.parametrize(("norm_of", "decay"), [("update", 0.0), ("activated", 0.0), ("activated", 0.02)])
def test_a_step_goes_down_the_gradient_of_the_whole_model(
    loaded: Loaded, site: MatrixSite, norm_of: Literal["update", "activated"], decay: float
) -> None:
    """Two steps by this writer, and by hand through the unsplit model; with decay the whole of ``W + Δ`` shrinks."""
    settings, mask = replace(SETTINGS, passes=2, learning_rate=0.5, norm_constraint=None), mask_for(site)
    settings = replace(settings, norm_of=norm_of, weight_decay=decay)
    task = task_for(loaded, site, settings)
    written = write(loaded, site, settings, edits=EDITS[:1])
    matrix = task.matrix
    assert matrix is not None
    allowed = torch.zeros(site.d * site.d_ff).index_fill(0, mask.indices, 1.0).view(site.d, site.d_ff)
    delta = torch.zeros(site.d, site.d_ff)
    losses = []
    for step in range(2):
        # The norm has no gradient at zero; the writer's is zero there, as is that of any number next to nothing.
        start = delta.clone().requires_grad_() if step else (delta + 0).requires_grad_()
        loss = loss_of_whole_model(loaded, site, EDITS[0], start, settings)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, start)
        delta = delta - 0.5 * (gradient.nan_to_num() * allowed + decay * (matrix + delta))
    whole, values = with_changed_mask(task, written)
    assert (len(whole.mask.indices) == site.d * site.d_ff) == bool(decay)
    assert written.losses == pytest.approx(losses[-1:], abs=1e-4)
    torch.testing.assert_close(whole.mask.dense(values), delta, rtol=1e-3, atol=1e-4)


def test_what_was_written_of_the_first_edits_is_gone_on_from(loaded: Loaded, site: MatrixSite) -> None:
    settings = replace(SETTINGS, weight_decay=1e-3)
    told: list[Progress] = []
    first = write(loaded, site, settings, edits=EDITS[:2])
    rest, whole = write(loaded, site, settings, start=first, told=told), write(loaded, site, settings)
    assert [progress.step for progress in told] == [3]
    assert (rest.losses, rest.calls, rest.kept) == (whole.losses, whole.calls, whole.kept)
    assert torch.equal(rest.values, whole.values)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_one_edit_is_taken_after_the_other(loaded: Loaded, site: MatrixSite, pooling: Pooling) -> None:
    told: list[Progress] = []
    settings = replace(SETTINGS, pooling=pooling, passes=40, learning_rate=0.3)
    written = write(loaded, site, settings, told=told)
    assert [(progress.step, progress.steps) for progress in told] == [(1, 3), (2, 3), (3, 3)]
    assert len(written.losses) == len(EDITS)
    once = write(loaded, site, replace(settings, passes=1))
    assert sum(written.losses) < 0.7 * sum(once.losses)
    assert written.calls.keys() == set(range(len(EDITS)))
    assert all(called > 0.4 for called in written.calls.values())


def test_no_weight_leaves_the_norm_constraint_or_the_mask(loaded: Loaded, site: MatrixSite) -> None:
    free = write(loaded, site, replace(SETTINGS, norm_constraint=None), density=0.2).values
    bound = write(loaded, site, replace(SETTINGS, norm_constraint=0.01), density=0.2).values
    assert free.abs().max() > 0.01
    assert bound.abs().max() == pytest.approx(0.01)
    assert free.shape == (round(0.2 * site.d * site.d_ff),)


def test_a_loss_that_is_low_and_stays_is_left(loaded: Loaded, site: MatrixSite) -> None:
    easy: dict[str, Any] = {"alpha": 10.0, "beta": 0.0, "gamma": 0.0}
    settings = replace(SETTINGS, learning_rate=1e-9, stop_loss=100.0, **easy)
    passed: list[int] = []
    task = WriterTask(loaded.model, site, mask_for(site), torch.zeros(1, site.d_ff), 1.0, settings)
    (examples,) = capture_groups(
        loaded, site, [([(0, EDITS[0])], CONTEXTS, ())], batch_size=32, train_end=False, window=False
    )[0]
    handle = site_of(loaded.model, 3).watched(loaded.model).register_forward_hook(lambda *_: passed.append(1))
    write_sequential(task, [single_pass(settings, examples, keys_in(loaded, site, UNRELATED))], lambda _: None)
    handle.remove()
    assert len(passed) - 1 == 3  # one of them reads the unrelated text; the third step finds the loss where it was


@pytest.mark.parametrize(
    ("edits", "unrelated", "expected"),
    [
        ([2.0], 0.1, 0.0),
        ([2.0], 0.75, 0.5),  # unrelated .5 above α
        ([0.6], 0.0, 0.4),  # edit .4 below β
        ([0.5, 1.5], 0.45, 0.2 + 0.5 + 0.45),  # the second row is beyond both margins, and counts for none
    ],
)
def test_the_margins_are_means_of_those_that_are_missed(edits: list[float], unrelated: float, expected: float) -> None:
    settings = EditSettings(alpha=0.25, beta=1.0, gamma=0.5)
    assert float(margins(torch.tensor(edits), torch.tensor(unrelated), settings)) == pytest.approx(expected, abs=1e-6)
