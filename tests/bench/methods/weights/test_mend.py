from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import alone, raised, save_tiny, whole_loss
from support.rewriting import EDITS, bench_for, check_holds_for_every_rewriting, losses, rows_of, weight_of, words
from support.thorough import few
from torch import Tensor
from transformers import PreTrainedModel

from wisecli.bench.methods.base import METHODS, Bench, UnsuitableError
from wisecli.bench.methods.weights.gradient_factors import gradient_factors
from wisecli.bench.methods.weights.mend import Mend, MendSettings
from wisecli.config import LoadOptions
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row, collate, encode
from wisecli.models.running.activations import capture
from wisecli.progress import Event

ARCHITECTURES = few(("llama", "gpt2", "gemma2", "granite", "gptj"), ("gpt2", "gemma2", "granite"))
UNTRAINED = MendSettings(passes=0, rank=4, first_rate=0.05)
TRAINED = MendSettings(passes=2, rank=4, first_rate=0.05)


def records(count: int) -> list[Edit]:
    """Made-up records: some have no rephrases, some no locality prompts."""
    prompts, others = (words(*[4, 5, 6] * count, seed=seed)[:count] for seed in (11, 12))
    targets, answers = (words(*[1, 2] * count, seed=seed)[:count] for seed in (14, 15))
    return [
        Edit(
            str(place), prompts[place], targets[place],
            rephrases=(f"ba {prompts[place]}",) if place % 3 else (),
            locality=(EvaluationPrompt(others[place], answers[place]),) if place % 4 else (),
        )
        for place in range(count)
    ]  # fmt: skip


def mend_bench(directory: Path, architecture: str, count: int = 24) -> Bench:
    return replace(bench_for(directory, architecture), train=records(count))


def gradients(model: PreTrainedModel, sites: Sequence[MatrixSite], rows: Sequence[Row]) -> list[Tensor]:
    """Sum over rows of the gradient (d, d_ff) of :func:`whole_loss` for each matrix, by one backward pass a row."""
    weights = [site.watched(model).get_parameter("weight").requires_grad_() for site in sites]
    for row in rows:
        whole_loss(model, row).backward()
    found = [weight.grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    return [gradient.T if site.transposed else gradient for gradient, site in zip(found, sites, strict=True)]


def moved(method: Mend, seed: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(site.d, site.d_ff, generator=generator) for site in method.sites]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factors_make_the_gradient_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    bench = mend_bench(tmp_path, architecture)
    model, rows, method = bench.loaded.model, rows_of(bench), Mend(bench, UNTRAINED)
    assert [site.layer for site in method.sites] == [1, 2, 3]
    part = capture(model, method.sites[0], collate(rows), above=False)
    method.deltas = moved(method)
    losses, factors = gradient_factors(model, method.sites, part, method.deltas)
    with method.applied():
        expected = gradients(model, method.sites, rows)
        one_by_one = torch.stack([whole_loss(model, row) for row in rows])
    torch.testing.assert_close(losses, one_by_one, atol=1e-5, rtol=1e-5)
    for place, (one, gradient) in enumerate(zip(factors, expected, strict=True)):
        assert len(one.keys) == len(one.gradients) == sum(len(row) - 1 for row in rows)
        torch.testing.assert_close(one.gradients.T @ one.keys, gradient, atol=1e-5, rtol=1e-4)
        # Before any training the pseudo-gradient is the gradient.
        torch.testing.assert_close(method.step(one, place), 0.05 * gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untrained_network_makes_edits_steps_of_gradient_descent(tmp_path: Path, architecture: str) -> None:
    bench = mend_bench(tmp_path, architecture)
    model, method = bench.loaded.model, Mend(bench, UNTRAINED)
    method.edit(EDITS)
    weights = [site.watched(model).get_parameter("weight") for site in method.sites]
    before = [weight.detach().clone() for weight in weights]
    with method.applied():
        edited = [alone(model, row) for row in rows_of(bench)]
    for row in rows_of(bench):
        for weight, site, gradient in zip(weights, method.sites, gradients(model, method.sites, [row]), strict=True):
            weight.data -= 0.05 * (gradient.T if site.transposed else gradient)
    for row, logits in zip(rows_of(bench), edited, strict=True):
        torch.testing.assert_close(logits, alone(model, row), atol=1e-3, rtol=1e-3)
    for weight, site, base, delta in zip(weights, method.sites, before, method.deltas, strict=True):
        change = (weight - base).T if site.transposed else weight - base
        assert (change - delta).norm() < 1e-3 * delta.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_that_of_whole_models_with_their_matrices_replaced(tmp_path: Path, architecture: str) -> None:
    """Each record of a batch by itself: its edit's pseudo-gradient is made and put into the model by hand."""
    bench = mend_bench(tmp_path, architecture)
    model, method = bench.loaded.model, Mend(bench, TRAINED)
    tokenizer = bench.loaded.tokenizer
    some = [edit for edit in bench.train if edit.rephrases and edit.locality][:3]
    rows = [
        (
            encode(tokenizer, edit.prompt, edit.target),
            encode(tokenizer, edit.rephrases[0], edit.target),
            encode(tokenizer, edit.locality[0].prompt, edit.locality[0].answer),
        )
        for edit in some
    ]
    found = float(method.loss(method._task(rows)))
    expected = []
    for edit, (_, reworded, unrelated) in zip(some, rows, strict=True):
        method.deltas = [torch.zeros_like(delta) for delta in method.deltas]
        method.edit([edit])
        before = alone(model, unrelated).softmax(-1)
        with method.applied():
            after = alone(model, unrelated).softmax(-1)
            drift = (before * (before / after).log()).sum(-1).mean()
            expected.append(0.1 * float(whole_loss(model, reworded)) + float(drift))
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3)


@pytest.mark.parametrize("architecture", few(["llama", "gpt2", "gemma2", "granite"], ["gpt2", "gemma2"]))
def test_training_lowers_the_loss_on_records_held_back(tmp_path: Path, architecture: str) -> None:
    bench = mend_bench(tmp_path, architecture, 40)
    for layer in range(4):
        raised(bench.loaded.model, bench.site(layer))
    method = Mend(bench, replace(TRAINED, passes=5, patience=5))
    assert len(method.validation) == 6
    assert min(method.validation) < method.validation[0]
    assert method._mean_loss(method._tasks(torch.Generator().manual_seed(bench.seed))[1]) == pytest.approx(
        min(method.validation), rel=1e-5
    )
    assert method.training_seconds > 0
    assert not any(parameter.requires_grad for parameter in method.editor.parameters())


def test_every_part_of_the_network_is_trained(tmp_path: Path) -> None:
    bench = mend_bench(tmp_path, "llama")
    before, after = (Mend(bench, settings).editor.state_dict() for settings in (UNTRAINED, TRAINED))
    same = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert {name.rpartition(".")[-1] for name in same} == {"middle", "spread"}


def test_training_stops_where_it_no_longer_helps_and_the_best_network_stays(tmp_path: Path) -> None:
    bench = mend_bench(tmp_path, "llama")
    method = Mend(bench, replace(TRAINED, passes=9, patience=2, rate=1e3))
    assert len(method.validation) == 3
    untrained = Mend(bench, UNTRAINED).editor.state_dict()
    assert all(torch.equal(value, untrained[name]) for name, value in method.editor.state_dict().items())


def test_the_same_seed_gives_the_same_and_leaves_chance_alone(tmp_path: Path) -> None:
    bench = mend_bench(tmp_path, "llama")
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    one, two = Mend(bench, TRAINED), Mend(bench, TRAINED)
    other = Mend(replace(bench, seed=9), TRAINED)
    assert torch.equal(torch.rand(1), first)
    one.edit(EDITS)
    for edit in EDITS:
        two.edit([edit])
    other.edit(EDITS)
    assert one.validation == two.validation != other.validation
    assert all(map(torch.equal, one.deltas, two.deltas))
    assert not any(map(torch.equal, one.deltas, other.deltas))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_takes(tmp_path: Path, architecture: str) -> None:
    bench = mend_bench(tmp_path, architecture)
    method = Mend(bench, TRAINED)
    before = losses(bench)
    method.edit(EDITS[:1])
    after = losses(bench, method)
    assert after[0] < before[0]
    method.edit(EDITS[1:])
    assert method.bytes() == 4 * sum(delta.numel() for delta in method.deltas)
    check_holds_for_every_rewriting(bench, method)


def test_in_half_precision_and_in_the_table(tmp_path: Path) -> None:
    told: list[Event] = []
    bench = replace(mend_bench(tmp_path, "gpt2"), on_progress=told.append)
    method = METHODS["mend"](
        replace(bench, loaded=load_model(tmp_path, load=LoadOptions(device="cpu", dtype="bfloat16")))
    )
    assert isinstance(method, Mend)
    method.edit(EDITS)
    assert [(event.done, event.total) for event in told[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(delta.dtype == torch.float32 and delta.isfinite().all() and delta.any() for delta in method.deltas)
    with method.applied():
        assert weight_of(method.bench.loaded.model, method.sites[0]).dtype == torch.bfloat16


def test_what_it_is_not_for(tmp_path: Path) -> None:
    bench = mend_bench(tmp_path / "model", "llama", 19)
    with pytest.raises(UnsuitableError, match="19: give more with --train"):
        Mend(bench, UNTRAINED)
    unread = [
        *records(19),
        Edit("odd", "ba", "..."),
        Edit("odder", "ba", "do", locality=(EvaluationPrompt("...", "do"),)),
    ]
    with pytest.raises(UnsuitableError, match="19: give more"):
        Mend(replace(bench, train=unread), UNTRAINED)
    bare = replace(bench, train=[replace(edit, locality=()) for edit in records(20)])
    with pytest.raises(UnsuitableError, match="0: give more"):
        Mend(replace(bare, texts=()), UNTRAINED)
    method = Mend(bare, UNTRAINED)
    with pytest.raises(UnsuitableError, match="'odd'"):
        method.edit([Edit("odd", "ba", "...")])
    bench.loaded.model.get_output_embeddings().weight.data[:] = torch.nan
    with pytest.raises(UnsuitableError, match="not finite"):
        method.edit(EDITS[:1])
    with pytest.raises(UnsuitableError, match="not finite"):
        Mend(bare, UNTRAINED)


def test_streamed_layers_are_refused(tmp_path: Path) -> None:
    bench = mend_bench(tmp_path / "model", "llama")
    save_tiny(tmp_path / "streamed", "llama")
    loaded = load_model(tmp_path / "streamed", load=LoadOptions(device="cpu", memory_budget=60_000))
    with pytest.raises(UnsuitableError, match="streamed"):
        Mend(replace(bench, loaded=loaded))
