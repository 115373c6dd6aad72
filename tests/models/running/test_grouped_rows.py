import torch

from wisecli.models.running.grouped_rows import rows_of


def test_rows_are_those_of_each_group_in_turn() -> None:
    rows, index = rows_of(torch.tensor([2, 0, 2, 1]), torch.tensor([2, 0, 3]))
    assert rows.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert index.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_no_groups_have_no_rows() -> None:
    assert [part.tolist() for part in rows_of(torch.tensor([], dtype=torch.long), torch.tensor([2, 3]))] == [[], []]
