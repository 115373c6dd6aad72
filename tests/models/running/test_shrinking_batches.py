"""Rows that leave a batch as they end: the answers are those of each prompt alone, without a cache."""

from collections.abc import Collection
from functools import partial
from itertools import combinations

import pytest
import torch
from support.helpers import greedy_by_loop, site_of, tiny_tokenizer
from support.tiny_models import VOCABULARY, Chain, tiny_model
from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedModel

from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.layout.architectures import CACHED
from wisecli.models.running.generation import generate
from wisecli.models.running.hooks import hooked
from wisecli.models.running.shrinking_batches import StopWhenFewContinue, unedited_beginnings

NEW = 8


def prompts(count: int = 8, *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY - 1, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """What follows one prompt, every token from a pass over all before it."""
    return greedy_by_loop(model, None, None, prompt, NEW, end=None)


def stopped(said: list[int], stops: Collection[int]) -> list[int]:
    """What is said up to a token that stops it."""
    return said[: next((place + 1 for place, token in enumerate(said) if token in stops), len(said))]


def require_alike(model: PreTrainedModel) -> None:
    """Answers in batches of several sizes are those of each prompt alone, and end at several lengths."""
    asked = prompts()
    free = [alone(model, prompt) for prompt in asked]
    spoken = sorted({token for said in free for token in said})
    stops = max(combinations(spoken, 3), key=lambda some: len({len(stopped(said, some)) for said in free}))
    expected = [stopped(said, stops) for said in free]
    assert len({len(said) for said in expected}) > 1
    for size in (1, 3, 8):
        found = generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW, batch_size=size, stops=stops)
        assert found == expected


def test_answers_of_an_architecture_are_those_of_each_prompt_alone(variant: str) -> None:
    require_alike(tiny_model(variant))


def test_a_recurrent_state_loses_the_rows_that_the_cache_loses() -> None:
    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    require_alike(FalconH1ForCausalLM(config).eval())


def test_a_row_ends_at_the_models_own_token_which_is_left_out() -> None:
    model, asked = tiny_model("llama"), prompts()
    free = [alone(model, prompt) for prompt in asked]
    end = free[0][3]
    model.generation_config.eos_token_id = end
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert any(len(answer) == NEW for answer in expected)
    assert generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW) == expected


def test_prompts_keep_what_they_decided_when_others_leave(chain: Chain, edited_chain: EditedModel) -> None:
    edited = edited_chain
    edits = [edit["prompt"] for edit in chain.edits]
    asked = [prompt for edit in edits for prompt in (edit, f"{edit} Well,")][:10]

    def answers(size: int) -> list[list[int]]:
        return generate(edited.model, edited.tokenizer, asked, max_new_tokens=10, batch_size=size)

    together = answers(10)
    assert together == answers(1)
    with edited.unedited():
        unedited = answers(10)
    assert sum(some != other for some, other in zip(together, unedited, strict=True)) > 4
    assert len({len(answer) for answer in together}) > 3


def test_what_prompts_begin_with_is_read_once_and_changes_no_answer(variant: str) -> None:
    model, beginning = tiny_model(variant), [7, 3, 11, 5, 2, 9, 13, 4, 6, 8, 12, 10]
    if site_of(model, 2).above != CACHED:
        pytest.skip("its layers go on from more than attention keeps")
    asked = [[*beginning, *prompt] for prompt in prompts()]
    read: list[torch.Size] = []
    begun = unedited_beginnings(model)
    with hooked(model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))):
        found = generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW, beginnings=begun)
        again = generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW, beginnings=begun)
    assert found == again == [alone(model, prompt) for prompt in asked]
    if model.config.get_text_config() is not model.config:
        return  # a model that reads images is asked as a whole
    assert list(map(tuple, read[:2])) == [(1, 12), (8, max(map(len, asked)) - 12)]
    assert [tuple(shape) for shape in read].count((1, 12)) == 1


def test_an_edit_answers_behind_what_prompts_begin_with(chain: Chain, edited_chain: EditedModel) -> None:
    edited = edited_chain
    asked = [f"{'Well, ' * 12}{edit['prompt']}" for edit in chain.edits[:4]]

    def answers(shared: bool) -> list[list[int]]:
        begun = unedited_beginnings(edited.model) if shared else None
        return generate(edited.model, edited.tokenizer, asked, max_new_tokens=6, beginnings=begun)

    assert answers(shared=True) == answers(shared=False)
    with edited.unedited():
        assert answers(shared=True) == answers(shared=False)


def test_an_answer_need_not_go_on_once_it_is_vain() -> None:
    model, asked = tiny_model("llama"), prompts()
    free = [alone(model, prompt) for prompt in asked]
    hopeless = [None if row % 2 else partial(vain, row % 4) for row in range(len(asked))]
    found = generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW, hopeless=hopeless)
    assert all(whole[: len(said)] == said for said, whole in zip(found, free, strict=True))
    assert found[1::2] == free[1::2]
    assert {len(said) for said in found[::2]} < set(range(1, NEW + 1))
    assert all(len(said) > row % 4 for row, said in enumerate(found) if not row % 2)


def vain(most: int, tokens: list[int]) -> bool:
    return len(tokens) > most


def test_a_step_runs_over_rows_that_go_on() -> None:
    model, asked = tiny_model("llama"), prompts(32)
    rows: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _module, _inputs, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    stops = range(5, VOCABULARY, 8)
    lengths = [len(answer) for answer in generate(model, tiny_tokenizer(), asked, max_new_tokens=NEW, stops=stops)]
    handle.remove()
    going_on = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert all(least <= some <= max(1, least / 0.75 + 1) for least, some in zip(going_on, rows, strict=True))
    assert rows[-1] < 32


def test_a_batch_stops_when_three_of_four_rows_go_on() -> None:
    few = StopWhenFewContinue(torch.tensor([7]), 4)
    assert few(torch.tensor([[7, 1], [1, 1], [1, 1], [7, 1]]), None).tolist() == [False] * 4
    assert few(torch.tensor([[1, 7], [1, 1], [1, 1], [1, 1]]), None).tolist() == [True] * 4
    assert few.ended.tolist() == [True, False, False, False]
