"""One expert's entry of a parameter is what transformers makes of all experts' tensors together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.every_type import save_type, tiny
from support.loading import CPU
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, ErnieFuseAndSplitTextVisionExperts, MergeModulelist, Transpose

from wisecli.io.checkpoint import Checkpoint
from wisecli.models.loading import load_model
from wisecli.models.streaming.expert_files import Assembly, assemblies


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "longcat_flash", "nemotron_h"])
def test_each_experts_tensors_give_its_entry(tmp_path: Path, model_type: str) -> None:
    model = load_model(save_type(tmp_path, model_type), load=CPU).model
    tensors = load_file(tmp_path / "model.safetensors")
    found = assemblies(model, "model.layers", Checkpoint(tmp_path))
    assert found
    for name, assembly in found.items():
        whole = model.get_parameter(name)
        for number, entry in enumerate(whole):
            parts = assembly.of_expert(number)
            assert all(f".{number}." in part for part in parts)
            assert torch.equal(assembly.joined([tensors[part]] for part in parts)[0], entry)


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    model = load_model(save_type(tmp_path, "qwen3_moe", num_experts=12), load=CPU).model
    for assembly in assemblies(model, "model.layers", Checkpoint(tmp_path)).values():
        assert all(f".experts.{number}." in part for number in range(12) for part in assembly.of_expert(number))


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama"])
def test_what_is_stored_as_it_runs_needs_nothing_put_together(tmp_path: Path, model_type: str) -> None:
    model = load_model(save_type(tmp_path, model_type), load=CPU).model
    assert assemblies(model, "model.layers", Checkpoint(tmp_path)) == {}


def test_nothing_of_a_quantised_model_is_put_together_so(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_type(tmp_path, "qwen3_moe"))
    model.config.quantization_config = {"quant_method": "fp8"}
    assert assemblies(model, "model.layers", Checkpoint(tmp_path)) == {}


def test_a_checkpoint_that_lacks_an_expert_is_left_to_transformers(tmp_path: Path) -> None:
    save_type(tmp_path, "qwen3_moe")
    model = tiny("qwen3_moe", num_experts=5)
    assert assemblies(model, "model.layers", Checkpoint(tmp_path)) == {}


STEPS: dict[str, tuple[list[Any], int, bool]] = {
    "joined": ([MergeModulelist(dim=0), Concatenate(dim=1)], 2, True),
    "joined and turned": ([MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)], 2, True),
    "one behind the other": ([MergeModulelist(dim=0), Concatenate(dim=0)], 2, False),
    "along another axis": ([MergeModulelist(dim=1)], 1, False),
    "turned the wrong way": ([MergeModulelist(dim=0), Transpose(0, 1)], 1, False),
    "by the model's own shapes": ([MergeModulelist(dim=0), Transpose(1, 2, check_dims=True)], 1, False),
    "for texts and images": ([ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)], 2, False),
}


@pytest.mark.parametrize("steps", STEPS)
def test_steps_that_mix_experts_are_known_by_what_they_give(steps: str) -> None:
    operations, sources, expected = STEPS[steps]
    patterns = [f"experts.*.{name}" for name in ("gate", "up")[:sources]]
    converter: Any = SimpleNamespace(operations=operations, source_patterns=patterns, target_patterns=["experts.both"])
    parts = {pattern: [f"experts.{number}.{pattern[-2:]}" for number in range(4)] for pattern in patterns}
    assert Assembly("experts.both", parts, converter).is_separable() is expected
