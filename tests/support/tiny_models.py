"""Tiny models of every architecture, randomly initialised, and what the fixtures give."""

from collections import namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

SAMPLE_EDITS = Path(__file__).parents[2] / "sample_edits" / "edits.jsonl"

VOCABULARY = 97

Outcome = namedtuple("Outcome", ["code", "out", "err"])

Wise = Callable[..., Outcome]

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

_FALCON_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}

_NEOX_SHAPE = {**_SHAPE, "intermediate_size": 128, "rotary_pct": 0.5}

# The window is shorter than some prompts, and layers above and below the edited one are of both kinds.
_GEMMA_SHAPE = {**_SHAPE, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}

_KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]

TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "mistral": MistralConfig(**_SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "gpt2": GPT2Config(**_GPT_SHAPE),
    "gptj": GPTJConfig(**_GPT_SHAPE, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**_NEOX_SHAPE),
    "gemma2": Gemma2Config(**_GEMMA_SHAPE, attn_logit_softcapping=5.0, final_logit_softcapping=20.0),
    "gemma3_text": Gemma3TextConfig(**_GEMMA_SHAPE, layer_types=_KINDS),
    "phi3": Phi3Config(**_SHAPE, sliding_window=6, pad_token_id=None),
    "olmo2": Olmo2Config(**_SHAPE, pad_token_id=None),
    "smollm3": SmolLM3Config(**_SHAPE, pad_token_id=None, no_rope_layers=[1, 0, 1, 0, 1]),
    "granite": GraniteConfig(
        **_SHAPE, residual_multiplier=0.4, embedding_multiplier=3.0, attention_multiplier=0.5, logits_scaling=0.5
    ),
    "stablelm": StableLmConfig(**_SHAPE),
    "falcon": FalconConfig(**_FALCON_SHAPE, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
}

# The last word of the tokenizer stands for a patch of an image.
IMAGE_TOKEN = VOCABULARY - 1

_EYE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}

TINY_CONFIGS["llava"] = LlavaConfig(
    text_config=LlamaConfig(**_SHAPE),
    vision_config=CLIPVisionConfig(**_EYE),
    image_token_index=IMAGE_TOKEN,
    vision_feature_layer=-1,
)

TINY_CONFIGS["qwen2_vl"] = Qwen2VLConfig(
    text_config={**_SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    vision_config={
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
        "initializer_range": 0.2,
    },
    image_token_id=IMAGE_TOKEN,
)

_AS_INITIALISED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj")

# One of each trait, for what takes long: an attention in parallel, a norm behind the matrix, a turned matrix, layers
# that give tuples, a multiplier.
TYPICAL = ("falcon", "gemma2", "gpt2", "gptj", "granite", "llama")

# Other forms of some architectures: what is tied, in parallel or absent is a setting there.
VARIANTS: dict[str, PretrainedConfig] = {
    "llama, tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "gpt_neox, sequential": GPTNeoXConfig(**_NEOX_SHAPE, use_parallel_residual=False),
    "stablelm, parallel": StableLmConfig(**_SHAPE, use_parallel_residual=True, use_qkv_bias=True),
    "falcon, parallel": FalconConfig(**_FALCON_SHAPE, parallel_attn=True, multi_query=True, bias=True),
    "falcon, sequential": FalconConfig(**_FALCON_SHAPE, parallel_attn=False, multi_query=False),
    "falcon, alibi": FalconConfig(**_FALCON_SHAPE, parallel_attn=False, multi_query=False, alibi=True),
    "gemma2, uncapped": Gemma2Config(**_GEMMA_SHAPE, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3_text, untied": Gemma3TextConfig(**_GEMMA_SHAPE, layer_types=_KINDS, tie_word_embeddings=False),
}


def loader_of(architecture: str) -> Any:
    """The class of transformers that loads an architecture with its head."""
    vision = hasattr((TINY_CONFIGS | VARIANTS)[architecture], "vision_config")
    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


def tiny_model(architecture: str, *, seed: int = 0, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A randomly initialised model, in float32 and evaluation mode.

    Args:
        config: its settings, if not those of ``TINY_CONFIGS``.
    """
    torch.manual_seed(seed)
    config = deepcopy(config or (TINY_CONFIGS | VARIANTS)[architecture])  # a model keeps its own
    model = loader_of(architecture).from_config(config).eval()
    if architecture not in _AS_INITIALISED:
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide what leaves them out
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


@dataclass(frozen=True)
class Chain:
    """What the chain of commands left behind for the sample edits on the real model."""

    model: Path
    shards: Path
    memory: Path
    exported: Path
    edits: list[dict[str, str]]
