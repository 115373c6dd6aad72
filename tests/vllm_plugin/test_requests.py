"""Which memory answers each token of a step: as `generate()` of transformers does, however requests are cut."""

import random
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wisecli.routing.deciding.prompt_window import UNROUTED, Answering, Tokens, TurnMarks
from wisecli.routing.memories.answer_pairs import AnswerPairs
from wisecli.vllm_plugin.requests import Requests

BREAK = 9
MARKS = TurnMarks(opener_token_ids=(BREAK, 7), turn_token_ids=(BREAK,), special_token_ids=(BREAK,))


def by_first_token(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Prompts that begin with 0 mean nothing; others the memory that they begin with, from their last token on."""
    return [(prompt[0] or UNROUTED, len(prompt) - 1) for prompt in prompts]


def routed(requests: Requests, step: dict[str, tuple[list[int], int]]) -> dict[str, tuple[list[int], list[bool]]]:
    """What a step says of its tokens: of each request, given its tokens and the place of the first."""
    ids = [token for tokens, _ in step.values() for token in tokens]
    places = [first + number for tokens, first in step.values() for number in range(len(tokens))]
    route = requests.step(list(step), [len(tokens) for tokens, _ in step.values()], tensor(ids), tensor(places))
    memory, inside = torch.full((len(ids),), UNROUTED), torch.zeros(len(ids), dtype=torch.bool)
    if route is not None:
        memory[route.token], inside[route.token] = route.memory, route.tokens.in_answer
    found, begin = {}, 0
    for name, (tokens, _) in step.items():
        end = begin + len(tokens)
        found[name] = (memory[begin:end].tolist(), inside[begin:end].tolist())
        begin = end
    return found


def tensor(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def in_transformers(tokens: list[int], prompt: int, memory: int) -> list[int]:
    """What answers each token of a prompt and its answer that are run at once."""
    ids = tensor(tokens)[None]
    known = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, :0], tensor([UNROUTED]))
    return known.answered_by(MARKS, Answering(tensor([memory]), tensor([prompt - 1])))[0].tolist()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(1, BREAK), max_size=6), st.lists(st.integers(1, BREAK))),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1 << 20),
)
def test_tokens_are_answered_as_in_transformers_however_requests_are_cut(
    asked: list[tuple[int, list[int], list[int]]], seed: int
) -> None:
    prompts = {f"r{number}": [first, *rest] for number, (first, rest, _) in enumerate(asked)}
    whole = {name: [*prompts[name], *answer] for name, (_, _, answer) in zip(prompts, asked, strict=True)}
    requests, chance = Requests(by_first_token, MARKS), random.Random(seed)
    requests.admit(prompts)
    done = dict.fromkeys(whole, 0)
    while any(done[name] < len(tokens) for name, tokens in whole.items()):
        step = {}
        for name, tokens in whole.items():
            count = chance.randint(0, len(tokens) - done[name])
            if count:
                step[name] = (tokens[done[name] : done[name] + count], done[name])
        for name, (memories, inside) in routed(requests, step).items():
            begin, size = done[name], len(memories)
            prompt = prompts[name]
            memory = prompt[0] or UNROUTED
            assert memories == in_transformers(whole[name], len(prompt), memory)[begin : begin + size]
            if memory != UNROUTED:
                assert inside == [place > len(prompt) - 1 for place in range(begin, begin + size)]
            done[name] += size


def test_a_guess_that_was_wrong_ends_no_answer() -> None:
    requests = Requests(by_first_token, MARKS)
    requests.admit({"r": [2, 4]})
    assert routed(requests, {"r": ([2, 4], 0)})["r"][0] == [UNROUTED, 2]
    assert routed(requests, {"r": ([5, BREAK, 6], 2)})["r"][0] == [2, UNROUTED, UNROUTED]
    assert routed(requests, {"r": ([6, 6], 3)})["r"][0] == [2, 2]  # the guess that ended it was not taken


def test_a_request_that_begins_anew_is_routed_anew() -> None:
    requests = Requests(by_first_token, MARKS)
    requests.admit({"r": [2, 4]})
    routed(requests, {"r": ([2, 4, 5, BREAK, 6], 0)})
    assert routed(requests, {"r": ([2, 4, 5], 0)})["r"][0] == [UNROUTED, 2, 2]
    assert routed(requests, {"r": ([BREAK, 6], 3)})["r"][0] == [UNROUTED, UNROUTED]
    assert routed(requests, {"r": ([6], 5)})["r"][0] == [UNROUTED]


def test_a_step_of_requests_that_nothing_answers_has_no_route() -> None:
    requests = Requests(by_first_token, MARKS)
    requests.admit({"r": [0, 4], "s": [2, 4]})
    assert requests.step(["r"], [2], tensor([0, 4]), tensor([0, 1])) is None
    requests.forget(["s"])
    assert requests.step(["s"], [2], tensor([2, 4]), tensor([0, 1])) is None
    assert requests.decided("r") == UNROUTED
    assert requests.decided("s") is None


def test_a_row_is_used_again_as_if_nothing_had_ended_in_it() -> None:
    requests = Requests(by_first_token, MARKS)
    requests.admit({"r": [2, 4]})
    routed(requests, {"r": ([2, 4, BREAK, 6], 0)})
    requests.forget(["r"])
    requests.admit({"s": [3, 4]})
    assert routed(requests, {"s": ([3, 4, 6, 6, 6], 0)})["s"][0] == [UNROUTED, 3, 3, 3, 3]


def test_the_same_prompt_is_decided_once() -> None:
    seen: list[list[tuple[int, ...]]] = []

    def decide(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        seen.append([tuple(prompt) for prompt in prompts])
        return by_first_token(prompts)

    Requests(decide, MARKS).admit({"r0": [1, 2], "r1": [1, 2], "s": [3]})
    assert seen == [[(1, 2), (3,)]]


def test_a_memory_may_answer_its_prompts_tokens_too() -> None:
    requests = Requests(by_first_token, MARKS, whole=True)
    requests.admit({"r": [2, 4, 5]})
    assert routed(requests, {"r": ([2, 4, 5, 6], 0)})["r"][0] == [2, 2, 2, 2]


SEPARATOR = 8
PAIRS = AnswerPairs(
    {
        "pairs.separator_token_id": tensor([SEPARATOR]),
        **{f"pairs.{part}": torch.zeros(4, dtype=torch.long) for part in ("separators", "begins", "ends", "usable")},
    }
)


@given(st.lists(st.sampled_from([3, SEPARATOR, BREAK]), max_size=9), st.integers(0, 1 << 20))
def test_two_edits_answer_in_turn_as_in_transformers(answer: list[int], seed: int) -> None:
    pair, prompt, chance = 1 + 4 * (2 + 1), [5, 5, SEPARATOR], random.Random(seed)
    requests = Requests(lambda prompts: [(pair, len(one) - 1) for one in prompts], MARKS, pairs=PAIRS)
    requests.admit({"r": prompt})
    whole, done = [*prompt, *answer], 0
    here = (tensor(whole) == SEPARATOR) & (torch.arange(len(whole)) >= len(prompt))
    before = tensor(in_transformers(whole, len(prompt), pair))
    expected = PAIRS.in_turn(before, here.long().cumsum(0), here).tolist()
    while done < len(whole):
        if done and chance.random() < 0.2:
            done = 0  # as after preemption
        count = chance.randint(1, len(whole) - done)
        memories, _ = routed(requests, {"r": (whole[done : done + count], done)})["r"]
        assert memories == expected[done : done + count]
        done += count
