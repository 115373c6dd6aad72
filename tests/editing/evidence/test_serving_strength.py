"""What residuals answer, and what becomes of them, at the strength that a lookup serves them with."""

from dataclasses import replace

import pytest
import torch
from support.capturing import capture_examples
from support.fitting import EDITS, SETTINGS, TRAINED, Bench, bench_of, entropies
from torch import Tensor

from wisecli.editing.evidence.serving_strength import bare_prompt_accuracy, weakened_where_needed
from wisecli.editing.examples.prompt_variants import AnswerKey


@pytest.fixture(scope="module")
def bench() -> Bench:
    return bench_of("llama")


def right(bench: Bench, number: int, update: Tensor) -> list[bool]:
    """Whether the whole model gives an edit's target with this added, in every context."""
    return [entropies(bench, number, context, lambda _: update)[1] for _, context in TRAINED]


@pytest.mark.parametrize("strength", [1.0, 8.0])
def test_what_residuals_answer_is_what_the_whole_model_says_with_them(bench: Bench, strength: float) -> None:
    for residuals in (bench.residuals(replace(SETTINGS, residual_steps=2)), bench.residuals()):
        shares = bare_prompt_accuracy(bench.task(), bench.batches, residuals, strength)
        for number in range(len(EDITS)):
            bare = right(bench, number, strength * residuals[AnswerKey(number)])[0]
            assert (shares[number] == 1) == bare
    assert (min(shares.values()) == 1) == (strength == 1)


def test_lessons_without_a_bare_prompt_among_their_rows_are_passed_over(bench: Bench) -> None:
    numbered = list(enumerate(EDITS))
    batches = capture_examples(bench.loaded, bench.site, numbered, TRAINED, batch_size=1, train_end=True)
    assert any(not bool((examples.contexts == 0).any()) for examples in batches)
    shares = bare_prompt_accuracy(bench.task(), batches, bench.residuals())
    assert shares == dict.fromkeys(range(len(EDITS)), 1.0)


@pytest.mark.parametrize("strength", [5.0, 8.0])
def test_an_answer_that_does_not_bear_the_strength_is_kept_smaller_by_as_much(bench: Bench, strength: float) -> None:
    residuals = bench.residuals()
    found = weakened_where_needed(bench.task(), bench.batches, residuals, strength)
    assert found.keys() == residuals.keys()
    smaller = set()
    for number in range(len(EDITS)):
        answer = AnswerKey(number)
        if all(right(bench, number, strength * residuals[answer])):
            assert found[answer] is residuals[answer]
        else:
            assert torch.equal(found[answer], residuals[answer] / strength)
            assert all(right(bench, number, strength * found[answer]))
            smaller.add(number)
    assert 0 < len(smaller) < len(EDITS)


def test_an_answer_that_less_does_not_help_keeps_its_residual(bench: Bench) -> None:
    early, strength = bench.residuals(replace(SETTINGS, residual_steps=8)), 2.0
    assert not all(
        right_there
        for number in range(len(EDITS))
        for right_there in right(bench, number, strength * early[AnswerKey(number)])
    )
    found = weakened_where_needed(bench.task(), bench.batches, early, strength)
    assert all(found[answer] is early[answer] for answer in early)
