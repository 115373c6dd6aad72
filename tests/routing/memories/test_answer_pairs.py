"""Which edit of a pair answers each token, and what it adds there: by loops over tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wisecli.routing.memories.answer_pairs import AnswerPairs

EDITS, SEPARATOR = 5, 7
PAIRS = AnswerPairs(
    {
        "pairs.separator_token_id": torch.tensor([SEPARATOR]),
        "pairs.separators": torch.tensor([20, 20, 21, 21, 20]),
        "pairs.begins": torch.arange(EDITS) * 4,
        "pairs.ends": (torch.arange(22) % 4 == 3).to(torch.uint8),
        "pairs.usable": torch.ones(EDITS, dtype=torch.uint8),
    }
)
edits = st.integers(0, EDITS - 1)


@given(edits, st.integers(-1, EDITS - 1))
def test_a_number_is_that_of_its_edits_alone(first: int, second: int) -> None:
    number = PAIRS.numbers(torch.tensor([first]), torch.tensor([second]))
    assert int(PAIRS.edits(number)) == first
    assert bool(PAIRS.waits(number)) == (second >= 0)
    assert not bool(PAIRS.begins_at(number))
    others = [(a, b) for a in range(EDITS) for b in range(-1, EDITS) if (a, b) != (first, second)]
    assert int(number) not in PAIRS.numbers(*torch.tensor(others).T).tolist()


@given(edits, edits, st.lists(st.sampled_from([3, SEPARATOR]), min_size=1, max_size=8), st.data())
def test_edits_answer_in_turn_however_the_answer_is_cut(a: int, b: int, answer: list[int], data: st.DataObject) -> None:
    number = PAIRS.numbers(torch.tensor([a]), torch.tensor([b]))
    expected, passed = [], False
    for token in answer:
        begins = token == SEPARATOR and not passed
        passed |= begins
        expected.append((b if passed else a, begins))
    found, start = [], 0
    while start < len(answer):
        end = start + data.draw(st.integers(1, len(answer) - start))
        ids = torch.tensor([answer[start:end]])
        here = ids == SEPARATOR
        numbers = PAIRS.in_turn(number[:, None].expand_as(ids), here.long().cumsum(1), here)
        found += list(zip(PAIRS.edits(numbers)[0].tolist(), PAIRS.begins_at(numbers)[0].tolist(), strict=True))
        start, number = end, numbers[:, -1]
    assert found == expected


def test_one_edit_alone_and_none_stay_as_they_are() -> None:
    numbers, here = torch.tensor([[2, 2, -1, -1]]), torch.tensor([[False, True, True, False]])
    assert PAIRS.in_turn(numbers, here.long().cumsum(1), here).tolist() == numbers.tolist()
    assert PAIRS.actions(numbers, torch.tensor([[3, 0, 3, -1]])).tolist() == [[-1] * 4]


@given(edits, edits, st.integers(-1, 19))
def test_the_separator_is_said_where_the_first_answer_would_end(a: int, b: int, residual: int) -> None:
    number = PAIRS.numbers(torch.tensor([a]), torch.tensor([b]))
    action = int(PAIRS.actions(number, torch.tensor([residual])))
    assert action == (a if residual >= 0 and residual % 4 == 3 else -1)
    if action >= 0:
        assert int(PAIRS.residuals_of(torch.tensor(action))) == [20, 20, 21, 21, 20][a]


@given(edits, edits, st.integers(-1, 19))
def test_the_second_answer_begins_at_the_separator_whatever_key_is_near(a: int, b: int, residual: int) -> None:
    number = PAIRS.numbers(torch.tensor([a]), torch.tensor([b]))
    one = torch.ones(1, dtype=torch.long)
    begins = PAIRS.in_turn(number, one, one.bool())
    action = PAIRS.actions(begins, torch.tensor([residual]))
    assert int(action) == EDITS + b
    assert int(PAIRS.residuals_of(action)) == 4 * b
