"""Models to test on: tiny ones of every architecture, and a real pretrained one with its whole chain of outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from wisecli import pipeline
from wisecli.config import EditSettings, MergeSettings
from wisecli.fetch import fetch

SAMPLE_EDITS = Path(__file__).parent.parent / "sample_edits" / "edits.jsonl"
VOCABULARY = 97

# Tiny models only lose by more threads, and figures must not depend on how many there are.
torch.set_num_threads(1)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "mistral": MistralConfig(**_SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "gpt2": GPT2Config(**_GPT_SHAPE),
    "gptj": GPTJConfig(**_GPT_SHAPE, rotary_dim=4),
}


def tiny_model(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised model, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(TINY_CONFIGS[architecture]).eval()


@pytest.fixture(params=sorted(TINY_CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every supported architecture in turn."""
    return str(request.param)


@dataclass(frozen=True)
class Chain:
    """What the chain of commands left behind for the sample edits on the real model."""

    model: Path
    shards: Path
    memory: Path
    exported: Path
    edits: list[dict[str, str]]


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once into the user cache."""
    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def chain(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Edit, merge and export the sample edits on the real model."""
    root = tmp_path_factory.mktemp("chain")
    shards, memory, exported = root / "shards", root / "memory", root / "edited"
    pipeline.edit(str(real_model), SAMPLE_EDITS, shards, EditSettings())
    pipeline.merge([shards], memory, MergeSettings())
    pipeline.export(memory, exported, link=False)
    edits = [json.loads(line) for line in SAMPLE_EDITS.read_text().splitlines()]
    return Chain(real_model, shards, memory, exported, edits)
