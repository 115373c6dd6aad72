import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.capturing import capture_examples
from support.fitting import EDITS, HELD_BACK, SETTINGS, TRAINED, Bench, bench_of, entropies, tokens_of
from support.helpers import Waits, hooked
from support.thorough import few
from support.tiny_models import TYPICAL
from torch import Tensor, nn

from wisecli.artifacts.shard import Mask, MaskKind
from wisecli.config import EditSettings
from wisecli.editing.evidence.serving_strength import bare_prompt_accuracy as shares_answered
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.closed_form import Solved, fit_residuals, write_solved
from wisecli.editing.writers.ridge import PENALTIES, Penalty
from wisecli.editing.writers.writer_task import Progress
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import NO_LABEL


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {architecture: bench_of(architecture) for architecture in TYPICAL}


@pytest.fixture(scope="module")
def bench(benches: dict[str, Bench]) -> Bench:
    return benches["llama"]


def nothing(keys: Tensor) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("architecture", few(TYPICAL, ("falcon", "gptj", "granite")))
def test_added_residuals_make_the_whole_model_predict_every_target_token(
    benches: dict[str, Bench], architecture: str
) -> None:
    bench = benches[architecture]
    residuals = bench.residuals()
    for number in range(len(EDITS)):
        for _, context in TRAINED:
            assert not entropies(bench, number, context, nothing)[1]
            own = residuals[AnswerKey(number)]
            losses, right = entropies(bench, number, context, lambda _, own=own: own)  # type: ignore[misc]
            assert right
            assert max(losses) < 2 * SETTINGS.residual_stop  # contexts are looked at in turn, a step apart


@pytest.mark.parametrize("architecture", few(TYPICAL, ("llama",)))
def test_between_two_looks_no_step_waits_for_the_device(benches: dict[str, Bench], architecture: str) -> None:
    bench = benches[architecture]
    with Waits() as few:
        bench.residuals(replace(SETTINGS, residual_steps=3, residual_stop=1e-9))
    with Waits() as many:
        bench.residuals(replace(SETTINGS, residual_steps=43, residual_stop=1e-9))
    steps = 40 * len(bench.groups)
    parts = sum(len(examples.contexts.unique()) for examples in bench.batches)
    looks = {"_local_scalar_dense": steps, "nonzero": 40 * parts}  # whether anybody is left, and which rows
    counted = {"_local_scalar_dense": steps}  # Adam numbers its steps on the host
    assert Counter(many.seen) - Counter(few.seen) == Counter(looks) + Counter(counted)


def test_every_edit_gets_a_residual_for_each_of_its_target_tokens(bench: Bench) -> None:
    residuals = bench.residuals(replace(SETTINGS, residual_steps=2))
    shapes = {answer.edit: tuple(residual.shape) for answer, residual in residuals.items()}
    lengths = [len(edit.target.split()) + 1 for edit in EDITS]
    assert shapes == {number: (length, bench.site.d) for number, length in enumerate(lengths)}


def test_a_finished_edit_stays_as_it_is_while_others_of_its_group_go_on(bench: Bench) -> None:
    late = bench.residuals()
    seen: list[set[int]] = [set()]
    for steps in range(2, SETTINGS.residual_steps, 2):
        early = bench.residuals(replace(SETTINGS, residual_steps=steps))
        seen.append({answer.edit for answer in early if torch.equal(early[answer], late[answer])})
        assert seen[-1] >= seen[-2]
        if seen[-1] == set(range(len(EDITS))):
            break
    assert seen[-1] == set(range(len(EDITS)))
    assert any(0 < len(frozen & {0, 1, 2}) < 3 for frozen in seen)


def test_only_answers_that_are_not_the_likeliest_go_on_after_the_usual_steps(bench: Bench) -> None:
    few = replace(SETTINGS, residual_steps=16)
    early, late = bench.residuals(few), bench.residuals(replace(few, residual_more=SETTINGS.residual_steps))
    likely, unlikely = set(), set()
    for number in range(len(EDITS)):
        both = [found[AnswerKey(number)] for found in (early, late)]
        before, after = (
            max(max(entropies(bench, number, context, lambda _, own=own: own)[0]) for _, context in TRAINED)  # type: ignore[misc]
            for own in both
        )
        # Losses are looked at a step before the end.
        if before < math.log(2) / 2:
            assert torch.equal(*both)
            likely.add(number)
        elif before > math.log(2):
            assert after < 2 * SETTINGS.residual_stop
            unlikely.add(number)
    assert likely
    assert unlikely


def test_no_edit_is_fitted_otherwise_for_the_company_it_is_in(bench: Bench) -> None:
    together = bench.residuals()
    for number, edit in enumerate(EDITS):
        own = capture_examples(bench.loaded, bench.site, [(number, edit)], TRAINED, batch_size=4, train_end=True)
        alone = fit_residuals(bench.task(), [own], lambda _: None)
        (answer,) = alone
        assert answer.edit == number
        torch.testing.assert_close(alone[answer], together[answer], rtol=0, atol=1e-2 * bench.unit)


def chatted(bench: Bench, targets: Sequence[str]) -> tuple[list[TrainingExamples], list[Edit]]:
    """Lessons in which every edit has another answer in the chat template, and the edits with those answers."""
    other = [replace(edit, target=target) for edit, target in zip(EDITS, targets, strict=True)]
    captured = capture_examples(
        bench.loaded, bench.site, list(enumerate(other)), TRAINED[:1], batch_size=4, train_end=True
    )
    keys = [tuple(AnswerKey(edit, chat=True) for edit in examples.edits.tolist()) for examples in captured]
    return [replace(examples, answers=own) for examples, own in zip(captured, keys, strict=True)], other


def test_an_answer_of_other_tokens_in_the_chat_template_has_residuals_of_its_own(bench: Bench) -> None:
    numbered = list(enumerate(EDITS))
    plain = capture_examples(bench.loaded, bench.site, numbered, TRAINED[:1], batch_size=4, train_end=True)
    batches, other = chatted(bench, ["ba be bi bo bu", "da", "fa fe fi fo", "ga ge", "ka ke ki"])
    found = fit_residuals(bench.task(), [[*plain, *batches]], lambda _: None)
    assert found.keys() == {AnswerKey(number, chat=chat) for number in range(len(EDITS)) for chat in (False, True)}
    for number, edit in enumerate(other):
        _, target = tokens_of(bench.loaded, edit, "")
        assert len(found[AnswerKey(number, chat=True)]) == len(target)
        assert len(found[AnswerKey(number)]) == len(tokens_of(bench.loaded, EDITS[number], "")[1])
    assert min(shares_answered(bench.task(), plain, found).values()) == 1
    assert min(shares_answered(bench.task(), batches, found).values()) == 1


def test_progress_counts_the_edits_of_all_groups(bench: Bench) -> None:
    told: list[Progress] = []
    fit_residuals(bench.task(), bench.groups, told.append)
    assert [(progress.step, progress.steps) for progress in told] == [(3, 5), (5, 5)]
    assert [progress.accuracy for progress in told] == [1.0, 1.0]
    assert all(progress.loss < SETTINGS.residual_stop for progress in told)


def solved(bench: Bench, settings: EditSettings = SETTINGS, mask: Mask | None = None) -> Solved:
    moment = bench.unrelated.T @ bench.unrelated
    task = bench.task(settings, mask)
    if task.mask.kind == "columns":
        moment = moment[task.mask.indices][:, task.mask.indices]
    return write_solved(task, bench.evidence, moment, bench.batches, bench.held_back, lambda _: None)


def answered(bench: Bench, delta: Tensor, context: str) -> list[bool]:
    return [entropies(bench, number, context, lambda keys: keys @ delta.T)[1] for number in range(len(EDITS))]


@pytest.mark.parametrize("architecture", few(TYPICAL, ("gemma2", "gpt2", "llama")))
def test_with_the_solved_change_the_whole_model_answers_every_edit(
    benches: dict[str, Bench], architecture: str
) -> None:
    bench = benches[architecture]
    mask = bench.mask()
    delta = mask.dense(solved(bench, mask=mask).values)
    for _, context in TRAINED:
        assert not any(answered(bench, torch.zeros_like(delta), context))
    assert all(answered(bench, delta, ""))


def by_normal_equations(bench: Bench, mask: Mask, penalty: Penalty) -> Tensor:
    """``Δ`` (d, d_ff) on the mask's columns, from keys and residuals collected row by row."""
    evidence = bench.evidence
    fitted = evidence.context != HELD_BACK[0]
    keys, wanted = evidence.keys[fitted].double()[:, mask.indices], evidence.residuals[fitted].double()
    moment = (bench.unrelated.T @ bench.unrelated).double()[mask.indices][:, mask.indices]
    moment /= moment.trace() / len(moment)
    energy = keys.square().sum() / len(keys) / keys.shape[1]
    weights = energy * (penalty.ridge * torch.eye(len(moment)) + penalty.unrelated * moment)
    part = torch.linalg.solve(keys.T @ keys / len(keys) + weights, keys.T @ wanted / len(keys)).T
    whole = torch.zeros(bench.site.d, bench.site.d_ff)
    whole[:, mask.indices] = part.float()
    return whole


@torch.no_grad()
def share(bench: Bench, delta: Tensor) -> float:
    """Mean share of right target tokens under the held-back context."""
    shares = []
    for edit in EDITS:
        prompt, target = tokens_of(bench.loaded, edit, HELD_BACK[1])
        start = len(prompt) - 1

        def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor, start: int = start) -> Tensor:
            return torch.cat([output[:, :start], output[:, start:] + inputs[0][:, start:] @ delta.T], dim=1)

        model = bench.loaded.model
        with hooked(model, bench.site, add):
            best = model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, start:].argmax(-1)
        shares.append(sum(int(a) == b for a, b in zip(best, target, strict=True)) / len(target))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_the_penalty_is_the_heaviest_that_answers_the_held_back_context_as_well_as_any(
    bench: Bench, density: float
) -> None:
    mask = bench.mask(density=density)
    found = solved(bench, replace(SETTINGS, polish=0), mask)
    place = PENALTIES.index(found.penalty)
    assert found.losses == ()
    candidates = [by_normal_equations(bench, mask, penalty) for penalty in PENALTIES]
    torch.testing.assert_close(mask.dense(found.values), candidates[place], rtol=1e-3, atol=1e-4)
    shares = [share(bench, delta) for delta in candidates]
    assert len(set(shares)) > 1
    assert shares[place] >= max(shares) - 0.005
    assert all(other < shares[place] for other in shares[:place])


def test_what_takes_is_not_polished(bench: Bench) -> None:
    assert solved(bench, replace(SETTINGS, polish=5)).losses == ()


@pytest.mark.parametrize("kind", ["columns", "elements"])
def test_an_edit_that_does_not_take_is_polished(bench: Bench, kind: MaskKind) -> None:
    mask = bench.mask(kind, density=0.15)
    rough = mask.dense(solved(bench, replace(SETTINGS, polish=0), mask).values)
    assert not all(answered(bench, rough, ""))
    polished = solved(bench, replace(SETTINGS, polish=8, polish_rate=0.3), mask)
    assert 0 < len(polished.losses) <= 8

    def loss(delta: Tensor) -> float:
        each = [entropies(bench, n, c, lambda keys: keys @ delta.T)[0] for n in range(len(EDITS)) for _, c in TRAINED]
        flat = [one for losses in each for one in losses]
        return sum(flat) / len(flat)

    assert loss(mask.dense(polished.values)) < 0.9 * loss(rough)


@pytest.mark.parametrize("kind", ["columns", "elements"])
@pytest.mark.parametrize("polish", [0, 2])
def test_nothing_outside_the_mask_changes_and_no_weight_of_the_model(bench: Bench, kind: MaskKind, polish: int) -> None:
    mask = bench.mask(kind, density=0.2)
    weights = {name: tensor.clone() for name, tensor in bench.loaded.model.state_dict().items()}
    values = solved(bench, replace(SETTINGS, polish=polish), mask).values
    assert values.shape == mask.shape
    allowed = torch.zeros(bench.site.d, bench.site.d_ff, dtype=torch.bool)
    if kind == "columns":
        allowed[:, mask.indices] = True
    else:
        allowed.view(-1)[mask.indices] = True
    delta = mask.dense(values)
    assert delta.any()
    assert not delta[~allowed].any()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.loaded.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bench.loaded.model.parameters())


def test_the_same_seed_solves_and_polishes_to_the_same_values(bench: Bench) -> None:
    settings, mask = replace(SETTINGS, polish=2), bench.mask(density=0.1)
    first, again = solved(bench, settings, mask), solved(bench, settings, mask)
    assert torch.equal(first.values, again.values)
    assert (first.penalty, first.losses) == (again.penalty, again.losses)
    assert len(first.losses) == 2
    assert not torch.equal(first.values, solved(bench, replace(settings, seed=1), mask).values)


def test_the_lessons_of_this_file_hold_every_edit_under_every_context(bench: Bench) -> None:
    seen = [
        (edit, context)
        for examples in [*bench.batches, *bench.held_back]
        for edit, context in zip(examples.edits.tolist(), examples.contexts.tolist(), strict=True)
    ]
    assert sorted(seen) == [(number, context) for number in range(len(EDITS)) for context in (0, 1, 2)]
    labels = [int((examples.activations.batch.labels != NO_LABEL).sum()) for examples in bench.batches]
    assert sum(labels) == 2 * sum(len(edit.target.split()) + 1 for edit in EDITS)
