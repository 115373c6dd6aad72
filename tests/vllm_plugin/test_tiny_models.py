"""Tiny edited models of every architecture in vLLM's own classes: what transformers answers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.every_type import save_type
from support.served import (
    EAGER,
    OWN,
    PROMPTS,
    VLLM,
    Runner,
    export_of,
    in_engine,
    in_transformers,
    serving,
    tiny_export,
)
from support.tiny_models import TINY_CONFIGS, loader_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.config import SiteName

pytestmark = serving

# vLLM refuses the base models of these, too: sizes as odd as tiny ones, heads that are not tied.
REFUSED = ("falcon", "gemma2")
# It asks for a processor of images, which tiny models do not have.
SEEING = ("llava", "qwen2_vl")


@pytest.mark.parametrize("architecture", sorted(set(TINY_CONFIGS) - {*SEEING}))
def test_every_architecture_answers_as_in_transformers(vllm: VLLM, tmp_path: Path, architecture: str) -> None:
    path = tiny_export(tmp_path, architecture)
    prompts = prompts_of(path)
    loader = loader_of(architecture)
    wanted = in_transformers(loader.from_pretrained(path, trust_remote_code=True).eval(), prompts)
    assert wanted != in_transformers(loader.from_pretrained(tmp_path / "model").eval(), prompts)
    found = vllm.ask(path, prompts, max_model_len=64, **EAGER)
    if architecture in REFUSED:
        assert found.refused
        assert vllm.ask(tmp_path / "model", prompts, max_model_len=64, **EAGER).refused
    else:
        assert found.answers == [wanted], found.refused


def answers_as_in_transformers(vllm: VLLM, path: Path, **settings: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Require it of an edited checkpoint; gives what it was asked and answered."""
    prompts = prompts_of(path)
    wanted = in_transformers(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval(), prompts)
    found = vllm.ask(path, prompts, max_model_len=64, **settings)
    assert found.answers == [wanted], found.refused
    return prompts, wanted


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_mixtures_answer_as_in_transformers(vllm: VLLM, tmp_path: Path, model_type: str) -> None:
    path = export_of(save_type(tmp_path / "model", model_type, hidden_size=128, head_dim=32), tmp_path)
    prompts, wanted = answers_as_in_transformers(vllm, path, **EAGER)
    assert wanted != in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), prompts)


def test_edits_behind_a_layer_answer_in_a_compiled_model(vllm: VLLM, tmp_path: Path) -> None:
    answers_as_in_transformers(vllm, tiny_export(tmp_path, "olmo2"), **OWN)


@pytest.mark.parametrize("site", ["matrix", "layer"])  # the matrix is cut, and what leaves a layer is not
def test_two_processes_answer_as_one(vllm: VLLM, tmp_path: Path, site: SiteName) -> None:
    path = tiny_export(tmp_path, "llama" if site == "matrix" else "olmo2", site=site)
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answers_as_in_transformers(vllm, path, **EAGER, **two)


def test_facts_in_matrices_answer_as_in_transformers(vllm: VLLM, tmp_path: Path) -> None:
    prompts, wanted = answers_as_in_transformers(vllm, tiny_export(tmp_path, mode="retrieve", site="matrix"), **EAGER)
    assert wanted != in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), prompts)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_run_beside_edits(vllm: VLLM, tmp_path: Path, runner: Runner) -> None:
    path = tiny_export(tmp_path)
    prompts = prompts_of(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    plain = in_transformers(model, prompts)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = in_transformers(adapted, prompts)
    assert wanted != plain
    asked = [prompt for prompt in prompts for _ in range(2)]
    adapters = [None, str(tmp_path / "adapter")] * len(prompts)
    # On a CPU vLLM gives an adapter to all requests of a step that holds one with it, edited or not: one by one.
    asking = {"adapters": adapters, "alone": True}
    found = vllm.ask(path, asked, asking=asking, enable_lora=True, max_model_len=64, **EAGER)
    if runner == "second":
        assert "set VLLM_USE_V2_MODEL_RUNNER=0" in found.refused
        return
    assert found.answers, found.refused
    assert found.answers[0][::2] == plain
    assert found.answers[0][1::2] == wanted


def test_transformers_never_loads_the_base_alone_beside_it(tmp_path: Path) -> None:
    found = json.loads(in_engine("beside_vllm.py", str(tiny_export(tmp_path))))
    assert found == {"sent": True, "trusted": "ValueError", "not trusted": "ValueError"}


def prompts_of(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


def test_a_model_is_refused_whose_requests_nobody_tells_of(vllm: VLLM, tmp_path: Path) -> None:
    path = tiny_export(tmp_path)
    found = vllm.ask(path, [[2, 3]], max_model_len=64, **EAGER, worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")
    assert "an edited model needs a worker of its own" in found.refused


def test_steps_are_not_cut_in_two(vllm: VLLM, tmp_path: Path) -> None:
    assert "steps cannot be cut in two" in vllm.ask(tiny_export(tmp_path), [[2, 3]], ubatch_size=2, **EAGER).refused


@pytest.mark.parametrize(("asks", "shared"), [(False, 2), (True, 0)])
def test_a_next_turn_reads_what_no_edit_answered_from_the_cache(
    vllm: VLLM, tmp_path: Path, *, asks: bool, shared: int
) -> None:
    path, size = tiny_export(tmp_path), 32
    first = prompts_of(path)[0 if asks else -1]
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    answer = in_transformers(model, [first], tokens=2 * size + 1)[0]
    turn = [*first, *answer, *prompts_of(path)[-2]]
    settings = {"max_model_len": 256, "block_size": size, "enable_prefix_caching": True, **EAGER}
    found = vllm.ask(path, [first, turn], tokens=2 * size + 1, asking={"alone": True}, **settings)
    assert found.answers, found.refused
    assert found.answers[0][0] == answer
    assert found.cached == [0, shared * size]
