"""How a request that mentions two edits is parted: against a search over all ways to cut it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wisecli.routing.gating.two_requests import first_part, request_parts


def cosines(tokens: int, places: list[int], seed: int) -> Tensor:
    """Cosines with an edit of a subject's token and a relation's two, which stand at some places of a request."""
    found = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(seed)) * 0.4
    for token, place in enumerate(places):
        found[place, token] = 0.95
    return found


def test_each_edit_is_asked_by_all_but_the_others_sentence() -> None:
    sentence = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    first, second = cosines(8, [3, 4, 5], 1), cosines(8, [0, 1, 2], 2)
    parts = request_parts((first, second), (1, 0), sentence)
    assert parts.first.tolist() == (sentence != 0).tolist()
    assert parts.second.tolist() == (sentence != 1).tolist()
    assert not parts.in_order
    assert request_parts((second, first), (0, 1), sentence).in_order


@given(st.integers(4, 14), st.integers(0, 1 << 16), st.data())
def test_a_sentence_is_cut_where_its_halves_have_the_edits_best(tokens: int, seed: int, data: st.DataObject) -> None:
    places = [[data.draw(st.integers(0, tokens - 1)) for _ in range(3)] for _ in range(2)]
    first, second = (cosines(tokens, one, seed + number) for number, one in enumerate(places))
    parts = request_parts((first, second), (0, 0), torch.zeros(tokens, dtype=torch.long))
    early, late = (parts.first, parts.second) if parts.in_order else (parts.second, parts.first)
    edge = int(early.sum())
    assert early.tolist() == [place < edge for place in range(tokens)]
    assert late.tolist() == [place >= edge for place in range(tokens)]

    def match(edit: Tensor, rows: slice) -> float:
        return float(edit[rows].amax(0).mean())

    every = [
        match(left, slice(cut)) + match(right, slice(cut, tokens))
        for cut in range(1, tokens)
        for left, right in ((first, second), (second, first))
    ]
    own = (first, second) if parts.in_order else (second, first)
    found = match(own[0], slice(edge)) + match(own[1], slice(edge, tokens))
    assert abs(found - max(every)) < 1e-5


def test_a_request_of_one_token_is_left_to_the_first() -> None:
    one = cosines(1, [0, 0, 0], 3)
    parts = request_parts((one, one), (0, 0), torch.zeros(1, dtype=torch.long))
    assert (parts.first.tolist(), parts.second.tolist()) == ([True], [False])


def test_the_first_part_is_what_the_second_edit_is_not_mentioned_in() -> None:
    axes = torch.eye(8)
    # An announcement, a sentence with the first edit, one with the second, and another.
    tokens = axes[[6, 6, 0, 1, 6, 2, 3, 6, 7, 7]]
    ends = torch.tensor([0, 1, 0, 0, 1, 0, 0, 2, 0, 1])
    edits = [(axes[[0]], axes[[1]]), (axes[[2]], axes[[3]])]
    projected = tokens.expand(2, -1, -1)
    assert first_part(projected, edits, ends).tolist() == [True] * 5 + [False] * 3 + [True] * 2
    assert first_part(projected, edits[::-1], ends).tolist() == [True] * 2 + [False] * 3 + [True] * 5
