"""Which edits' subjects prompts name, against plain counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wisecli.routing.deciding.subject_match import MIN_SUBJECT_SHARE, SPAN_MARGIN, SPAN_PER_WORD, SubjectMatch
from wisecli.routing.memories.subject_tensors import SubjectToken, subject_match_tensors

SUBJECTS = (
    (
        (SubjectToken((3, 30), 0.5), SubjectToken((7,), 0.3), SubjectToken((9,), 0.2)),
        (SubjectToken((20,), 0.5), SubjectToken((21,), 0.5)),
    ),
    (),
    ((SubjectToken((7,), 1.0),),),
    ((SubjectToken((3, 30), 0.4), SubjectToken((11,), 0.6)),),
)


def names() -> SubjectMatch:
    return SubjectMatch(subject_match_tensors(SUBJECTS), len(SUBJECTS))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([3, 7, 9], [True, True, True, False]),
        ([7, 1, 30, 1], [True, True, True, False]),
        ([9, 1, 30, 1], [False, True, False, False]),
        ([3, 30, 3], [False, True, False, False]),
        ([7], [False, True, True, False]),
        ([20, 21, 9], [True, True, False, False]),
        ([20, 7, 9], [False, True, True, False]),
        ([11], [False, True, False, False]),
        ([11, 30], [False, True, False, True]),
        ([1, 2, 4], [False, True, False, False]),
    ],
)
def test_a_prompt_names_a_subject_if_it_holds_most_of_its_words_if_any(ids: list[int], expected: list[bool]) -> None:
    row = torch.tensor([ids])
    assert names()(row, torch.ones_like(row, dtype=torch.bool)).tolist() == [expected]


@given(
    rows=st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=1, max_size=4),
    ends=st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
def test_names_are_those_that_a_plain_count_finds(rows: list[list[int]], ends: list[int]) -> None:
    prompt = torch.tensor([[place < end for place in range(6)] for _, end in zip(rows, ends, strict=False)])
    found = names()(torch.tensor(rows), prompt).tolist()
    for row, end, own in zip(rows, ends, found, strict=False):
        for subject, said in zip(SUBJECTS, own, strict=True):
            shares = [sum(word.share for word in name if set(word.tokens) & set(row[:end])) for name in subject]
            assert said == (max(shares, default=1.0) >= MIN_SUBJECT_SHARE - 1e-4)


def test_shares_add_up_in_full_precision() -> None:
    many = ((tuple(SubjectToken((token,), 1 / 40) for token in range(40)),),)
    coarse = SubjectMatch(subject_match_tensors(many), 1).to(torch.bfloat16)
    for count, said in ((30, True), (29, False)):
        ids = torch.arange(count)[None]
        assert coarse(ids, torch.ones_like(ids, dtype=torch.bool)).tolist() == [[said]]


# Of the first subject: its first name has three words, which may stand in ten tokens.
REACH = 3 * SPAN_PER_WORD + SPAN_MARGIN


@pytest.mark.parametrize(("apart", "near"), [(0, True), (REACH - 2, True), (REACH - 1, False), (40, False)])
def test_words_of_a_name_stand_near_each_other(apart: int, near: bool) -> None:
    row = torch.tensor([[1, 3, *[1] * apart, 7, 1]])
    pair = torch.zeros(1, dtype=torch.long)
    there = torch.ones_like(row, dtype=torch.bool)
    assert names()(row, there)[0, 0]
    assert names().in_one_place(row, there, pair, pair).tolist() == [near]
    assert not names().in_one_place(row, row != 7, pair, pair).any()


@given(rows=st.lists(st.lists(st.sampled_from((1, 3, 7, 9, 11, 20, 21, 30)), min_size=24, max_size=24), min_size=2))
def test_names_in_one_place_are_those_that_a_plain_search_finds(rows: list[list[int]]) -> None:
    ids = torch.tensor(rows)
    pairs = torch.ones(len(rows), len(SUBJECTS)).nonzero(as_tuple=True)
    found = names().in_one_place(ids, torch.ones_like(ids, dtype=torch.bool), *pairs).view(len(rows), -1).tolist()
    for row, own in zip(rows, found, strict=True):
        for subject, said in zip(SUBJECTS, own, strict=True):
            spans = [
                (name, set(row[first : first + len(name) * SPAN_PER_WORD + SPAN_MARGIN]))
                for name in subject
                for first in range(len(row))
            ]
            shares = [sum(word.share for word in name if set(word.tokens) & span) for name, span in spans]
            assert said == (max(shares, default=1.0) >= MIN_SUBJECT_SHARE - 1e-4)
