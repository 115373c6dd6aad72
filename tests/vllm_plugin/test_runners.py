"""What vLLM's model runners tell a memory of requests, and the scheduler of those that no edit answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.memory_alone import served
from support.served import PROMPTS, tiny_export
from torch import Tensor
from transformers import AutoTokenizer

from wisecli.vllm_plugin.engine_names import UNANSWERED
from wisecli.vllm_plugin.model_state import state_class
from wisecli.vllm_plugin.runner import track_requests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("tiny"), site="matrix")


def prompts_of(checkpoint: Path) -> dict[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    return {prompt: tokenizer(prompt).input_ids for prompt in PROMPTS}


class Runner:
    """Of vLLM's model runners what is looked at."""

    def __init__(self, model: Any) -> None:
        self.model, self.lora_config = model, None
        self.input_batch = SimpleNamespace(req_ids=[], num_reqs=0)
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.long))
        self.positions = torch.zeros(64, dtype=torch.long)

    def get_model(self) -> Any:
        return self.model

    def load_model(self) -> None: ...

    def _dummy_run(self, count: int) -> Tensor:
        answer = torch.zeros(count, 128)
        memory = self.model.wise_memory
        width = memory.memory.whitened_keys.shape[1]
        memory.add_to(answer, lambda tokens: (torch.ones(len(tokens), width), True), real=True)
        return answer

    def _update_states(self, output: Any) -> str:
        self.input_batch = SimpleNamespace(req_ids=[one.req_id for one in output.scheduled_new_reqs], num_reqs=2)
        return "updated"

    def _prepare_inputs(self, output: Any, counts: Tensor) -> str:
        begin = 0
        for one in output.scheduled_new_reqs:
            end = begin + len(one.prompt_token_ids)
            self.input_ids.gpu[begin:end] = torch.tensor(one.prompt_token_ids)
            self.positions[begin:end] = torch.arange(end - begin)
            begin = end
        return "prepared"

    def sample_tokens(self, _grammar: Any) -> Any:
        return SimpleNamespace(req_ids=self.input_batch.req_ids)


def test_a_runner_tells_of_requests_and_of_those_that_no_edit_answers(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    prompts = prompts_of(checkpoint)
    new = [
        SimpleNamespace(req_id=name, prompt_token_ids=prompts[text], lora_request=None)
        for name, text in (("asks", PROMPTS[1]), ("other", PROMPTS[3]))
    ]
    runner: Any = Runner(SimpleNamespace(wise_memory=memory))
    track_requests(runner)
    runner.load_model()
    assert not runner._dummy_run(1).any()  # vLLM runs some before any request comes, as if they were requests'
    step = SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set())
    assert runner._update_states(step) == "updated"
    assert memory.is_unanswered("other")
    assert not memory.is_unanswered("asks")
    counts = torch.tensor([len(one.prompt_token_ids) for one in new])
    assert runner._prepare_inputs(step, counts) == "prepared"
    width = memory.memory.whitened_keys.shape[1]
    answer = torch.zeros(int(counts.sum()), 128)
    memory.add_to(answer, lambda tokens: (torch.ones(len(tokens), width), True), real=True)
    assert answer.any(1).nonzero().flatten().tolist() == [int(counts[0]) - 1]
    assert not runner._dummy_run(1).any()
    assert getattr(runner.sample_tokens(None), UNANSWERED) == ["other"]
    assert not hasattr(runner.sample_tokens(None), UNANSWERED)  # it is said once


@pytest.mark.parametrize("within", ["model_runner_output", None])
def test_a_second_runner_tells_of_requests_that_no_edit_answers(checkpoint: Path, within: str | None) -> None:
    memory, _ = served(checkpoint)
    reported = SimpleNamespace(req_ids=["asks", "other"])
    given = SimpleNamespace(**{within: reported}) if within else reported
    kind = type("Second", (Runner,), {"sample_tokens": lambda _self, _grammar: given})
    runner = kind(SimpleNamespace(wise_memory=memory))
    track_requests(runner, second=True)
    prompts = prompts_of(checkpoint)
    memory.admit({"asks": prompts[PROMPTS[1]], "other": prompts[PROMPTS[3]]})
    assert runner.sample_tokens(None) is given
    assert getattr(reported, UNANSWERED) == ["other"]


class State:
    """Of the state of vLLM's second model runner what is looked at."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def add_request(self, req_index: int, new_req_data: Any) -> None: ...

    def remove_request(self, req_id: str) -> None: ...

    def apply_staged_writes(self) -> None: ...

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"given": True}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {"given": False}


def test_the_state_of_a_second_runner_tells_of_requests(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    prompts = prompts_of(checkpoint)
    state = state_class(State)(SimpleNamespace(wise_memory=memory))
    assert memory.follows_requests
    for index, text in enumerate((PROMPTS[1], PROMPTS[3])):
        # After preemption what has been generated comes along; the prompt ends where it did.
        new = SimpleNamespace(req_id=text, prompt_token_ids=prompts[text], prefill_token_ids=[*prompts[text], 3])
        state.add_request(index, new)
    state.apply_staged_writes()
    assert memory.is_unanswered(PROMPTS[3])
    ids = torch.tensor([*prompts[PROMPTS[1]], 3])
    batch = SimpleNamespace(
        req_ids=[PROMPTS[1]],
        num_reqs=1,
        num_scheduled_tokens=torch.tensor([len(ids)]),
        input_ids=ids,
        positions=torch.arange(len(ids)),
    )
    assert state.prepare_inputs(batch, None) == {"given": True}
    answer, width = torch.zeros(len(ids), 128), memory.memory.whitened_keys.shape[1]

    def keys(tokens: Tensor) -> tuple[Tensor, bool]:
        return torch.ones(len(tokens), width), True

    memory.add_to(answer, keys, real=True)
    assert answer[len(ids) - 2].any()
    assert not answer[: len(ids) - 2].any()
    assert state.prepare_dummy_inputs(1, 1) == {"given": False}
    answer = torch.zeros(len(ids), 128)
    memory.add_to(answer, keys, real=True)
    assert not answer.any()
    state.remove_request(PROMPTS[3])
    assert not memory.is_unanswered(PROMPTS[3])
