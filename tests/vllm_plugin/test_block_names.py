"""Names of blocks of a cache: the same for the same keys and values, and for no others."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from wisecli.routing.deciding.prompt_window import TurnMarks
from wisecli.vllm_plugin.block_names import BlockNames, named_by, prompt_end

SIZE = 4


@dataclass
class Request:
    """Of a request of vLLM's what names of blocks are made from."""

    all_token_ids: list[int]
    block_hashes: list[bytes] = field(default_factory=list)
    _block_hasher: Any = None

    def __post_init__(self) -> None:
        self._block_hasher = chained
        self.update()

    def update(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))

    def append(self, tokens: list[int]) -> None:
        self.all_token_ids.extend(tokens)
        self.update()


def chained(request: Request) -> list[bytes]:
    """Each block's name from its tokens and the name before, as an engine does it."""
    names = list(request.block_hashes)
    known = len(names)
    for begin in range(known * SIZE, len(request.all_token_ids) - SIZE + 1, SIZE):
        tokens = repr(request.all_token_ids[begin : begin + SIZE]).encode()
        names.append(hashlib.sha256((names[-1] if names else b"") + tokens).digest())
    return names[known:]


def named(prompt: list[int], answer: list[list[int]], *, unanswered: bool = False) -> list[bytes]:
    """Names of a request's blocks, whose answer comes in parts."""
    request = Request(list(prompt))
    own = BlockNames(chained, SIZE, len(prompt) - 1, str(len(prompt) - 1))
    own.take_over(request)
    if unanswered:
        own.unanswered()
    for part in answer:
        request.append(part)
    return request.block_hashes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.lists(st.lists(st.integers(0, 3)), max_size=6))
def test_names_do_not_depend_on_how_an_answer_comes(prompt: list[int], answer: list[list[int]]) -> None:
    together = [token for part in answer for token in part]
    assert named(prompt, answer) == named(prompt, [together])
    assert len(named(prompt, answer)) == (len(prompt) + len(together)) // SIZE


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_blocks_before_a_prompts_end_are_everybodys_and_others_only_of_the_same_prompt(
    prompt: list[int], answer: list[int]
) -> None:
    asked, next_turn = named(prompt, [answer]), Request([*prompt, *answer]).block_hashes
    before = (len(prompt) - 1) // SIZE
    assert asked[:before] == next_turn[:before]
    assert not set(asked[before:]) & set(next_turn[before:])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_what_no_edit_answers_is_everybodys_unless_its_end_has_a_name_already(
    prompt: list[int], answer: list[int]
) -> None:
    names, plain = named(prompt, [answer], unanswered=True), Request([*prompt, *answer]).block_hashes
    if len(prompt) % SIZE:
        assert names == plain
    else:
        assert names == named(prompt, [answer])


def test_blocks_that_are_taken_back_are_named_again() -> None:
    request = Request(list(range(10)))
    BlockNames(chained, SIZE, 5, "5").take_over(request)
    names = list(request.block_hashes)
    del request.block_hashes[1:]
    request.update()
    assert request.block_hashes == names


def test_a_prompt_ends_behind_the_opening_of_an_answer() -> None:
    marks = TurnMarks(opener_token_ids=(1, 7), turn_token_ids=(1,), special_token_ids=(1, 2))
    assert prompt_end(marks, [1, 5, 6, 2, 1, 7]) == 5
    assert prompt_end(marks, [1, 5, 6, 2, 1, 7, 4, 4]) == 5
    assert prompt_end(marks, [4, 5, 6]) == 2
    assert named_by([1, 2]) != named_by([1, 2, 3])
