"""Batches of prompts that begin alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wisecli.models.prompts.shared_beginnings import batches_by_beginning

LONG = tuple(range(100, 150))
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40).map(tuple), max_size=30)


@given(PROMPTS, st.integers(1, 8))
def test_every_prompt_is_in_one_batch_and_batches_keep_their_size(prompts: list[tuple[int, ...]], size: int) -> None:
    batches = list(batches_by_beginning(prompts, size))
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))
    assert all(1 <= len(batch) <= size for batch in batches)


def test_prompts_are_read_behind_a_beginning_that_spares_more_than_it_costs() -> None:
    alike = [(*LONG, number, 1) for number in range(4)]
    others = [(number, *LONG, 1) for number in range(4)]
    batches = list(batches_by_beginning([*alike, *others], 8))
    assert sorted(map(sorted, batches)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Two of them spare no more than the one beginning.
    assert [sorted(batch) for batch in batches_by_beginning([*alike[:2], *others], 8)] == [[0, 1, 2, 3, 4, 5]]


def test_prompts_of_a_longer_beginning_are_read_apart_from_those_of_a_shorter_one() -> None:
    short = [(*LONG[:16], number, *range(number, number + 20)) for number in range(8)]
    long = [(*LONG, number, 1) for number in range(8)]
    batches = [sorted(batch) for batch in batches_by_beginning([*short, *long], 16)]
    assert sorted(batches) == [list(range(8)), list(range(8, 16))]


def test_prompts_of_a_batch_are_like_in_length_behind_what_they_begin_with() -> None:
    prompts = [tuple(range(number, number + length)) for number, length in enumerate((300, 3, 240, 19, 61, 4, 46, 201))]
    batches = [[len(prompts[index]) for index in batch] for batch in batches_by_beginning(prompts, 8)]
    assert batches == [[3, 4, 19], [46, 61], [201, 240], [300]]
