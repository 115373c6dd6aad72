"""A memory in an engine: decisions, residuals, requests and releases, with a reader in the place of vLLM's layers."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.memory_alone import served
from support.served import PROMPTS, tiny_export
from torch import Tensor
from transformers import AutoTokenizer

from wisecli.io.checkpoint import read_json
from wisecli.routing.deciding.decision import Decision
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.passes.engine_checks import LostMemoryError
from wisecli.vllm_plugin import requests
from wisecli.vllm_plugin.processes import Processes
from wisecli.vllm_plugin.releases import release_in
from wisecli.vllm_plugin.served_memory import Edited, Take


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


def test_no_more_tokens_are_decided_at_once_than_memory_is_left_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, _ = served(checkpoint)
    prompts = [prompt for prompt in prompts_of(checkpoint).values() for _ in range(4)]
    prompts.insert(1, prompts[0] * 5)  # beside which all others would be padded
    wanted, most = memory.decide(prompts), 3 * max(map(len, prompts[2:]))
    monkeypatch.setattr(requests, "_AT_ONCE", most)
    run, sizes = memory.reader.run, []

    def counting(windows: Sequence[Tensor], take: Take) -> Decision:
        sizes.append([len(window) for window in windows])
        return run(windows, take)

    monkeypatch.setattr(memory.reader, "run", counting)
    assert memory.decide(prompts) == wanted
    assert len(sizes) > 2
    assert all(len(lengths) == 1 or len(lengths) * max(lengths) <= most for lengths in sizes)


@given(st.lists(st.integers(0, 3 * requests._AT_ONCE)))
def test_rows_are_looked_at_once_and_few_together(lengths: list[int]) -> None:
    found = [rows.tolist() for rows in requests.batches(torch.tensor(lengths, dtype=torch.long))]
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows in found:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= requests._AT_ONCE


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
