"""The prompt's decision: where it ends, what it names, and how it is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import grow
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from wisecli.models.forward_pass import CACHE_ARGUMENT
from wisecli.routing.prompt_gate import NAMED, UNROUTED, Names, PromptGate, cache_given, cache_returned
from wisecli.routing.router import route
from wisecli.routing.scores import MemoryScores, SideMemory
from wisecli.routing.subject_names import Word, names_of


def held(gate: PromptGate, chosen: list[list[int]], mask: list[list[int]] | None, cache: Any = None) -> list[list[int]]:
    named = {"attention_mask": None if mask is None else torch.tensor(mask), CACHE_ARGUMENT: cache}
    gate.before_forward(nn.Identity(), (), named)
    memory = MemoryScores(SideMemory({}, (1.0, 1.0, 1.0), routing="sequence"))
    nearest = torch.tensor(chosen)
    memory.index = lambda *_: (torch.full(nearest.shape, 2.0), nearest)
    keys = torch.zeros(*nearest.shape, 1)
    prompt = gate.prompt(None, keys)
    decision = route(memory, keys, prompt)
    assert decision.at_prompt is not None
    gate.keep(prompt, decision.at_prompt)
    return decision.chosen.tolist()  # type: ignore[no-any-return]


N = UNROUTED


@pytest.mark.parametrize(
    ("chosen", "mask", "expected"),
    [
        ([[0, 1, 2]], None, [[N, N, 2]]),
        ([[0, 1, N]], None, [[N, N, N]]),
        ([[0, 1, 2], [N, N, 1]], [[1, 1, 1], [0, 1, 1]], [[N, N, 2], [N, N, 1]]),
        ([[0, 1, 2], [1, 0, N]], [[0, 0, 1], [1, 1, 1]], [[N, N, 2], [N, N, N]]),
        ([[0, 1, 2], [2, 1, 0]], [[1, 1, 0], [1, 0, 0]], [[N, 1, 1], [2, 2, 2]]),
        ([[1]], [[1]], [[1]]),
    ],
    ids=["no mask", "no mask, unrouted", "left padding", "left padding, unrouted", "right padding", "one token"],
)
def test_the_gate_decides_at_each_rows_last_prompt_token(
    chosen: list[list[int]], mask: list[list[int]] | None, expected: list[list[int]]
) -> None:
    assert held(PromptGate(), chosen, mask) == expected
    assert held(PromptGate(), chosen, mask, DynamicCache()) == expected


def test_the_gate_holds_its_choice_over_cached_steps() -> None:
    gate, cache = PromptGate(), DynamicCache()
    assert held(gate, [[0, 1, 2], [1, 1, N], [N, N, 0]], [[1, 1, 1], [0, 1, 1], [0, 0, 1]], cache) == [
        [N, N, 2],
        [N, N, N],
        [N, N, 0],
    ]
    grow(cache, 3, 3)
    step = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert held(gate, [[N], [1], [1]], step, cache) == [[2], [N], [0]]
    grow(cache, 3, 1)
    step = [[*row, 1] for row in step]
    assert held(gate, [[0], [0], [N]], step, cache) == [[2], [N], [0]]


def test_several_tokens_on_a_used_cache_are_a_prompt_of_their_own() -> None:
    gate, cache = PromptGate(), DynamicCache()
    held(gate, [[0, 1, 2], [1, 1, N], [N, N, 0]], None, cache)
    grow(cache, 3, 3)
    held(gate, [[0], [0], [0]], None, cache)
    grow(cache, 3, 1)
    # The third row has nothing but padding in this pass, and goes on with its own answer.
    mask = [[1] * 6, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert held(gate, [[0, 1], [2, N], [1, 1]], mask, cache) == [[N, 1], [N, N], [0, 0]]
    grow(cache, 3, 2)
    assert held(gate, [[0], [0], [N]], [[*row, 1] for row in mask], cache) == [[1], [N], [0]]


def test_a_cache_that_the_model_makes_itself_keeps_the_decision() -> None:
    gate, cache = PromptGate(), DynamicCache()
    held(gate, [[0, 1]], [[1, 1]])
    grow(cache, 1, 2)
    gate.after_forward(nn.Identity(), (), BaseModelOutputWithPast(**{CACHE_ARGUMENT: cache}))
    assert held(gate, [[0]], [[1, 1, 1]], cache) == [[1]]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_the_names_of_all_releases(name: str) -> None:
    cache = DynamicCache()
    assert cache_given({"attention_mask": None, name: cache}) is cache
    assert cache_given({name: None}) is None
    assert cache_returned(SimpleNamespace(**{name: cache})) is cache
    assert cache_returned((torch.zeros(1),)) is None


def test_a_cache_by_another_name_is_not_passed_over() -> None:
    gate, cache = PromptGate(), DynamicCache()
    named = {"attention_mask": torch.ones(1, 3), "input_ids": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="what the prompt decided would be lost"):
        gate.before_forward(nn.Identity(), (), {**named, "kept": cache})
    gate.before_forward(nn.Identity(), (), {**named, CACHE_ARGUMENT: cache})


def test_the_gate_forgets_when_the_cache_is_emptied() -> None:
    gate, cache = PromptGate(), DynamicCache()
    assert held(gate, [[0, 1]], [[1, 1]], cache) == [[N, 1]]
    grow(cache, 1, 2)
    assert held(gate, [[0]], [[1, 1, 1]], cache) == [[1]]
    cache.crop(-2)
    assert cache.get_seq_length() == 0
    assert held(gate, [[2, 0]], [[1, 1]], cache) == [[N, 0]]


def test_the_gate_keeps_the_choices_of_several_caches_apart() -> None:
    gate, first, second = PromptGate(), DynamicCache(), DynamicCache()
    held(gate, [[0, 1]], [[1, 1]], first)
    grow(first, 1, 2)
    held(gate, [[1, 0], [0, N]], [[1, 1], [1, 1]], second)
    grow(second, 2, 2)
    assert held(gate, [[N]], [[1, 1, 1]], first) == [[1]]
    assert held(gate, [[N], [1]], [[1, 1, 1], [1, 1, 1]], second) == [[0], [N]]
    assert held(gate, [[1, 2]], [[1, 1]]) == [[N, 2]]


def test_the_gate_decides_anew_on_a_cache_that_was_filled_without_it() -> None:
    gate, cache = PromptGate(), DynamicCache()
    grow(cache, 2, 3)
    mask = [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert held(gate, [[0, 1], [1, N]], mask, cache) == [[N, 1], [N, N]]


# --- names ---

SUBJECTS = (
    ((Word((3, 30), 0.5), Word((7,), 0.3), Word((9,), 0.2)), (Word((20,), 0.5), Word((21,), 0.5))),
    (),
    ((Word((7,), 1.0),),),
    ((Word((3, 30), 0.4), Word((11,), 0.6)),),
)


def names() -> Names:
    return Names(names_of(SUBJECTS), len(SUBJECTS))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([3, 7, 9], [True, True, True, False]),
        ([9, 1, 30, 1], [True, True, False, False]),
        ([3, 30, 3], [False, True, False, False]),
        ([7], [False, True, True, False]),
        ([20, 21, 9], [True, True, False, False]),
        ([20, 7, 9], [False, True, True, False]),
        ([11], [False, True, False, True]),
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
            assert said == (max(shares, default=1.0) >= NAMED - 1e-4)


def test_shares_add_up_in_full_precision() -> None:
    many = ((tuple(Word((token,), 1 / 40) for token in range(40)),),)
    coarse = Names(names_of(many), 1).to(torch.bfloat16)
    for count, said in ((24, True), (23, False)):
        ids = torch.arange(count)[None]
        assert coarse(ids, torch.ones_like(ids, dtype=torch.bool)).tolist() == [[said]]


def test_the_gate_reads_names_in_the_prompt_alone_and_not_in_its_padding() -> None:
    gate, keys = PromptGate(), torch.zeros(2, 4, 1)
    ids, mask = torch.tensor([[7, 7, 1, 2], [7, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    gate.before_forward(nn.Identity(), (), {"input_ids": ids, "attention_mask": mask})
    found = gate.prompt(names(), keys).named
    assert found is not None
    assert found[:, 0, 2].tolist() == [False, True]
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    gate.before_forward(nn.Identity(), (ids.flip(-1),), {"attention_mask": right})
    found = gate.prompt(names(), keys).named
    assert found is not None
    assert found[:, 0, 2].tolist() == [False, True]


def test_names_have_no_say_once_a_prompt_is_decided_or_where_there_are_none() -> None:
    gate, cache = PromptGate(), DynamicCache()
    held(gate, [[0, 1]], [[1, 1]], cache)
    grow(cache, 1, 2)
    assert gate.prompt(names(), torch.zeros(1, 1, 1)).named is None
    assert PromptGate().prompt(None, torch.zeros(1, 2, 1)).named is None


def named_in(gate: PromptGate, cache: DynamicCache, ids: list[int]) -> bool:
    """Whether a pass over some tokens names the third subject, whose one word is token 7."""
    gate.before_forward(nn.Identity(), (), {"input_ids": torch.tensor([ids]), CACHE_ARGUMENT: cache})
    prompt = gate.prompt(names(), torch.zeros(1, len(ids), 1))
    gate.keep(prompt, torch.zeros(1, 1, dtype=torch.long))
    grow(cache, 1, len(ids))
    return prompt.named is not None and bool(prompt.named[0, 0, 2])


def test_a_prompt_in_several_passes_holds_the_words_of_all_and_the_next_question_only_its_own() -> None:
    gate, cache = PromptGate(), DynamicCache()
    assert not named_in(gate, cache, [1, 2, 4])
    assert named_in(gate, cache, [7, 2])
    assert named_in(gate, cache, [2, 4, 1])
    assert not named_in(gate, cache, [5])
    assert not named_in(gate, cache, [2, 4, 1])
    assert named_in(gate, cache, [4, 7])


def test_a_gate_that_reads_names_wants_tokens() -> None:
    gate = PromptGate()
    gate.before_forward(nn.Identity(), (), {"inputs_embeds": torch.zeros(1, 2, 3)})
    with pytest.raises(ValueError, match="input_ids"):
        gate.prompt(names(), torch.zeros(1, 2, 1))
