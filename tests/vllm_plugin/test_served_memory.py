"""A memory in an engine: decisions, residuals, requests and releases, with a reader in the place of vLLM's layers."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.memory_alone import served
from support.served import PROMPTS, tiny_export
from torch import Tensor
from transformers import AutoTokenizer

from wisecli.io.checkpoint import read_json
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.passes.engine_checks import LostMemoryError
from wisecli.vllm_plugin.engine_names import UNANSWERED
from wisecli.vllm_plugin.model_state import state_class
from wisecli.vllm_plugin.processes import Processes
from wisecli.vllm_plugin.releases import release_in
from wisecli.vllm_plugin.runner import track_requests
from wisecli.vllm_plugin.served_memory import Edited


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("tiny"), site="matrix")


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "edited"))


def prompts_of(checkpoint: Path) -> dict[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    return {prompt: tokenizer(prompt).input_ids for prompt in PROMPTS}


def test_prompts_are_decided_as_in_transformers(checkpoint: Path) -> None:
    memory, model = served(checkpoint)
    prompts = list(prompts_of(checkpoint).values())
    alone = [torch.tensor([prompt]) for prompt in prompts]
    wanted = [tuple(model.decided(ids, torch.ones_like(ids))[0].tolist()) for ids in alone]
    assert memory.decide(prompts) == wanted
    assert [number for number, _ in wanted] == [0, 1, 2, UNROUTED, UNROUTED, UNROUTED]


def test_what_a_memory_holds_takes_no_more_than_in_its_file(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    stored = load_file(checkpoint / "model-side-memory.safetensors")
    held = sum(one.numel() * one.element_size() for one in memory.memory.buffers())
    assert held <= 1.01 * sum(one.numel() * one.element_size() for one in stored.values())


def test_residuals_are_those_of_transformers(checkpoint: Path) -> None:
    memory, model = served(checkpoint)
    prompts = prompts_of(checkpoint)
    module = model.get_submodule(model.config.wise["module"])
    passed: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        handle = module.register_forward_hook(lambda _module, given, output: passed.append((given[0], output)))
        for prompt in prompts.values():
            model(torch.tensor([prompt]))
        handle.remove()
        memory.admit(prompts)
        memory.follows_requests = True
        counts = [len(prompt) for prompt in prompts.values()]
        ids = torch.tensor([token for prompt in prompts.values() for token in prompt])
        places = torch.cat([torch.arange(count) for count in counts])
        memory.begin(list(prompts), counts, ids, places)
        keys, wanted = (torch.cat([one[part][0] for one in passed]) for part in (0, 1))
        answer = torch.nn.functional.linear(keys, module.weight, module.bias)
        assert not torch.allclose(answer, wanted)
        memory.add_to(answer, lambda tokens: (keys[tokens], True), real=True)
    assert torch.allclose(answer, wanted, atol=1e-5)


def test_a_process_that_another_adds_for_adds_nothing(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    prompt = prompts_of(checkpoint)[PROMPTS[0]]
    memory.admit({"r": prompt})
    memory.follows_requests = True
    memory.begin(["r"], [len(prompt)], torch.tensor(prompt), torch.arange(len(prompt)))
    width, asked = memory.memory.whitened_keys.shape[1], []

    def keys(tokens: Tensor, *, mine: bool) -> tuple[Tensor, bool]:
        asked.append(tokens.tolist())
        return torch.ones(len(tokens), width), mine

    answer = torch.zeros(len(prompt), 128)
    memory.add_to(answer, partial(keys, mine=False), real=True)
    assert not answer.any()
    memory.add_to(answer, partial(keys, mine=True), real=True)
    assert answer[-1].any()
    assert asked == [list(range(len(prompt)))] * 2  # every process takes part in putting keys together


def test_a_trial_run_gets_nothing_and_needs_nobody_to_tell_of_requests(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    answer = torch.zeros(2, 128)
    memory.add_to(
        answer, lambda tokens: (torch.ones(len(tokens), memory.memory.whitened_keys.shape[1]), True), real=False
    )
    assert not answer.any()


def test_an_engine_that_tells_nothing_of_requests_does_not_answer(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    with pytest.raises(LostMemoryError, match="does not tell the memory of its requests"):
        memory.add_to(torch.zeros(1, 128), lambda _tokens: (torch.ones(1, 128), True), real=True)


def test_a_memory_that_was_not_loaded_answers_nothing(checkpoint: Path) -> None:
    memory, _ = served(checkpoint, loaded=False)
    with pytest.raises(LostMemoryError, match="was not loaded"):
        memory.admit({"r": [1]})
    with pytest.raises(LostMemoryError, match="lacks tensors"):
        memory.load({}, torch.device("cpu"))


def test_a_memory_that_measures_activations_is_refused() -> None:
    with pytest.raises(ValueError, match="serve what the closed form writes"):
        Edited.of({"module": "model.layers.2.mlp.down_proj", "memory": {"activated": True}})


def replace(checkpoint: Path, **changes: Any) -> None:
    """Put another release in a checkpoint's place: without its last edit, and other entries of the manifest."""
    manifest = read_json(checkpoint / "router.json") | changes
    other = checkpoint.with_name("other")
    shutil.copytree(checkpoint, other)
    config = read_json(checkpoint / "config.json")
    config["wise"]["memory"]["thresholds"][0] = 2.0  # more than any prompt reaches
    (other / "config.json").write_text(json.dumps(config))
    (other / "router.json").unlink()
    (other / "router.json").write_text(json.dumps(manifest))
    shutil.rmtree(checkpoint)
    other.rename(checkpoint)


def test_the_next_requests_are_answered_by_the_release_that_was_put_there(checkpoint: Path) -> None:
    memory, _ = served(checkpoint)
    prompt = prompts_of(checkpoint)[PROMPTS[0]]
    memory.admit({"before": prompt})
    replace(checkpoint)
    memory.admit({"after": prompt})
    assert not memory.is_unanswered("before")
    assert memory.is_unanswered("after")
    memory.forget(["before"])
    memory.admit({"again": prompt})
    assert memory.is_unanswered("again")


@pytest.mark.parametrize(("others", "seen"), [(False, True), (True, False)])
def test_a_release_answers_once_every_process_has_it(checkpoint: Path, *, others: bool, seen: bool) -> None:
    before = release_in(checkpoint)
    processes = Processes(lambda own: own if seen else before, lambda own: own and others)
    memory, _ = served(checkpoint, processes=processes)
    prompt = prompts_of(checkpoint)[PROMPTS[0]]
    replace(checkpoint)
    memory.admit({"after": prompt})
    assert not memory.is_unanswered("after")  # the one before answers


def test_what_was_made_for_another_base_takes_nothings_place(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory, _ = served(checkpoint)
    prompt = prompts_of(checkpoint)[PROMPTS[0]]
    replace(checkpoint, base={"matrix": "0", "config": "0"})
    memory.admit({"after": prompt})
    assert not memory.is_unanswered("after")


class Runner:
    """Of vLLM's first model runner what is looked at."""

    def __init__(self, model: Any) -> None:
        self.model, self.lora_config = model, None
        self.input_batch = SimpleNamespace(req_ids=[], num_reqs=0)
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.long))
        self.positions = torch.zeros(64, dtype=torch.long)

    def get_model(self) -> Any:
        return self.model

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
    step = SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set())
    assert runner._update_states(step) == "updated"
    assert memory.follows_requests
    assert memory.is_unanswered("other")
    assert not memory.is_unanswered("asks")
    counts = torch.tensor([len(one.prompt_token_ids) for one in new])
    assert runner._prepare_inputs(step, counts) == "prepared"
    width = memory.memory.whitened_keys.shape[1]
    answer = torch.zeros(int(counts.sum()), 128)
    memory.add_to(answer, lambda tokens: (torch.ones(len(tokens), width), True), real=True)
    assert answer.any(1).nonzero().flatten().tolist() == [int(counts[0]) - 1]
    assert getattr(runner.sample_tokens(None), UNANSWERED) == ["other"]


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
