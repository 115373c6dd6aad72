"""Which turns of a conversation are the user's, by its tokens alone."""

import pytest
import torch
from torch import Tensor

from wisecli.routing.deciding.late_interaction import compared_tokens, earlier_turn_tokens

OPEN, CLOSE, BEGIN, END = 90, 91, 92, 93
BREAKS = torch.tensor([OPEN, CLOSE, BEGIN, END])
USER, ASSISTANT, SYSTEM, LINE = 1, 2, 3, 4


def one_marker(role: int, words: list[int]) -> list[int]:
    """A turn that a special token and a role's name begin."""
    return [OPEN, role, LINE, *words, CLOSE, LINE]


def name_between(role: int, words: list[int]) -> list[int]:
    """A turn that a role's name between two special tokens begins."""
    return [OPEN, role, BEGIN, LINE, *words, END]


def compared(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    real = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    first = torch.zeros_like(real)
    first[:, 0] = True
    last = compared_tokens(ids, real, first, BREAKS)
    return ids, last, earlier_turn_tokens(ids, real, last, BREAKS)


@pytest.mark.parametrize("turn", [one_marker, name_between])
@pytest.mark.parametrize("system", [False, True])
def test_only_turns_of_the_same_role_count(turn: type, system: bool) -> None:
    talk = [*(turn(SYSTEM, [20, 21, 22, 23, 24]) if system else []), *turn(USER, [30, 31, 32, 33])]
    talk += [*turn(ASSISTANT, [40, 41, 42, 43]), *turn(USER, [50, 51, 52, 53]), *turn(ASSISTANT, [60, 61, 62, 63])]
    talk += [*turn(USER, [70, 71, 72, 73]), OPEN, ASSISTANT]
    ids, last, before = compared([talk, talk[:9]])
    words = [token for token in ids[0][before[0]].tolist() if token > SYSTEM + LINE]
    assert words == [30, 31, 32, 33, 50, 51, 52, 53]
    assert {70, 71, 72, 73} <= set(ids[0][last[0]].tolist())
    assert not (before & last).any()


def test_no_more_than_two_turns_before_the_last_are_looked_at() -> None:
    talk = [one for first in (10, 20, 30, 40) for one in one_marker(USER, [first, first + 1, first + 2, first + 3])]
    ids, _, before = compared([talk])
    assert {token // 10 for token in ids[0][before[0]].tolist() if token >= 10} == {2, 3}


def test_bare_text_has_no_turns() -> None:
    assert not compared([[5, 6, 7, 8, 9], [5, 6]])[2].any()
