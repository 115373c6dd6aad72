"""Where prompts end and what a decision reads, against plain loops over one row's tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wisecli.routing.deciding.prompt_window import (
    NO_TOKEN,
    UNROUTED,
    WINDOW,
    Answering,
    Tokens,
    TurnMarks,
    window_of,
    windows,
)

# A template that begins turns with 7, opens the assistant's with 7 8 9, and ends them with 6; 1 ends texts.
MARKS = TurnMarks((7, 8, 9), (7,), (1, 6, 7))
BARE = TurnMarks(special_token_ids=(1,))


def row(ids: list[int], earlier: list[int] | None = None, memory: int = UNROUTED) -> Tokens:
    here = torch.tensor([ids])
    before = torch.tensor([earlier or []], dtype=torch.long).reshape(1, -1)
    return Tokens(here, torch.ones_like(here, dtype=torch.bool), before, torch.tensor([memory]))


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_a_window_is_a_prompt_or_its_first_token_and_its_last_ones(length: int) -> None:
    tokens = list(range(10, 10 + length))
    expected = tokens if length <= WINDOW else [10, *tokens[-(WINDOW - 1) :]]
    assert window_of(tokens) == expected
    ids = torch.tensor([[0, *tokens, 5, 5]])
    real = torch.tensor([[False, *[True] * (length + 2)]])
    found, there = windows(ids, real, torch.tensor([length]))
    assert there.all()
    assert found.tolist() == [expected]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=5),
    size=st.integers(2, 6),
)
def test_windows_of_a_batch_are_those_of_its_rows(lengths: list[tuple[int, int, int]], size: int) -> None:
    width = max(map(sum, lengths))
    ids, real = torch.full((len(lengths), width), 99), torch.zeros(len(lengths), width, dtype=torch.bool)
    ends, expected = [], []
    for number, (left, prompt, answer) in enumerate(lengths):
        own = list(range(10 * number, 10 * number + prompt))
        ids[number, left : left + prompt + answer] = torch.tensor([*own, *[7] * answer])
        real[number, left : left + prompt + answer] = True
        ends.append(left + prompt - 1)
        expected.append(own if prompt <= size else [own[0], *own[1 - size :]])
    found, there = windows(ids, real, torch.tensor(ends), size)
    assert [one[own].tolist() for one, own in zip(found, there, strict=True)] == expected
    assert bool((there.long().diff(dim=1) <= 0).all())


def test_a_row_without_a_prompt_has_an_empty_window() -> None:
    ids = torch.tensor([[5, 6], [5, 6]])
    _, there = windows(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([-1, 0]))
    assert there.sum(1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("ids", "end"),
    [
        ([3, 4, 5], 2),  # bare: the last token
        ([7, 2, 6, 7, 8, 9], 5),  # the opener
        ([7, 2, 6, 7, 8, 9, 3, 4], 5),  # an answer that is begun is no part of the prompt
        ([7, 8, 9, 3, 6, 7, 2, 6, 7, 8, 9], 10),  # the last opener
        ([7, 8, 9, 3, 6, 7, 2, 6], 7),  # the answer is over, and no other is opened
        ([7, 8], 1),
    ],
)
def test_whole_prompts_end_behind_the_last_open_turn_of_the_assistant(ids: list[int], end: int) -> None:
    for left, right in ((0, 0), (2, 0), (0, 3)):
        padded = torch.tensor([[0] * left + ids + [0] * right])
        real = torch.tensor([[False] * left + [True] * len(ids) + [False] * right])
        assert MARKS.ends_in(padded, real).tolist() == [end + left]


def ends_by_loop(ids: list[int], sizes: list[int], marks: TurnMarks) -> list[int]:
    """For each part of a row of tokens the place in it at which a prompt ends, as the definition says it."""
    found, first = [], 0
    for size in sizes:
        seen, last = ids[: first + size], -1
        for place in range(first, first + size):
            opener = list(marks.opener_token_ids)
            if opener and ids[max(0, place + 1 - len(opener)) : place + 1] == opener:
                last = place - first
        chat = bool(set(seen) & set(marks.turn_token_ids))
        if last < 0 and not chat and (size > 1 or first == 0):
            last = size - 1
        found.append(last)
        first += size
    return found


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(1, 10), min_size=1, max_size=24),
    sizes=st.lists(st.integers(1, 6), min_size=24, max_size=24),
    marks=st.sampled_from([MARKS, BARE, TurnMarks()]),
)
def test_prompts_end_in_a_pass_where_a_loop_over_its_tokens_finds_it(
    ids: list[int], sizes: list[int], marks: TurnMarks
) -> None:
    parts, first = [], 0
    while first < len(ids):
        parts.append(min(sizes[len(parts)], len(ids) - first))
        first += parts[-1]
    expected = ends_by_loop(ids, parts, marks)
    first = 0
    for size, end in zip(parts, expected, strict=True):
        assert row(ids[first : first + size], ids[:first]).prompt_ends(marks).tolist() == [end]
        first += size


def test_what_an_unknown_token_said_opens_nothing() -> None:
    tokens = row([9, 3], [7, NO_TOKEN])
    assert tokens.prompt_ends(MARKS).tolist() == [-1]
    assert row([9, 3], [7, 8]).prompt_ends(MARKS).tolist() == [0]


def answered_by_loop(ids: list[int], before: int, memory: int, end: int, breaks: tuple[int, ...]) -> list[int]:
    found, now = [], before if end < 0 else UNROUTED
    for place, token in enumerate(ids):
        if token in breaks:
            now = UNROUTED
        if place == end:
            now = memory
        found.append(now)
    return found


@given(
    ids=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    before=st.sampled_from([UNROUTED, 2]),
    memory=st.sampled_from([UNROUTED, 4]),
    data=st.data(),
)
def test_an_answer_goes_on_until_a_special_token_or_the_next_prompts_end(
    ids: list[int], before: int, memory: int, data: st.DataObject
) -> None:
    end = data.draw(st.integers(-1, len(ids) + 2))
    answering = Answering(torch.tensor([memory]), torch.tensor([end]))
    found: Tensor = row(ids, memory=before).answered_by(MARKS, answering)
    assert found.tolist() == [answered_by_loop(ids, before, memory, end, MARKS.special_token_ids)]


def test_a_memory_that_answers_whole_rows_answers_their_prompts_too() -> None:
    answering = Answering(torch.tensor([4]), torch.tensor([2]))
    assert row([3, 1, 3, 3, 1, 3]).answered_by(MARKS, answering, whole=True).tolist() == [[4, 4, 4, 4, -1, -1]]
    assert row([3, 1], memory=2).answered_by(MARKS, answering, whole=True).tolist() == [[4, 4]]


def test_marks_survive_their_description() -> None:
    assert TurnMarks.from_dict(MARKS.as_dict()) == MARKS
    assert TurnMarks.from_dict(None) == TurnMarks()


def test_what_is_decided_goes_through_one_tensor() -> None:
    answering = Answering(torch.tensor([3, UNROUTED]), torch.tensor([5, 6]))
    again = Answering.unpacked(answering.packed())
    assert again.memory.tolist() == [3, UNROUTED]
    assert again.end.tolist() == [5, 6]
