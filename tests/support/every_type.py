"""Every type of causal language model that transformers has, as a tiny, randomly drawn model."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.helpers import tiny_qwen2_tokenizer, tiny_tokenizer
from support.tiny_models import VOCABULARY

LAYERS = 5
_LARGEST = 16_000_000
# Settings by the names that configs have for them.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("embedding_size", "lru_width", "hidden_size_per_layer_input", "rnn_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff", "dense_intermediate_size"), 64
    ),
    "decoder_ffn_dim": 64,
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "mamba_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_latent_size",), None),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k", "experts_per_token"), 2),
    **dict.fromkeys(("num_experts_per_token", "n_activated_experts", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "rotary_dim", "index_topk"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_heads",), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_d_ssm", "state_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size"), 16),
    **dict.fromkeys(("attention_chunk_size",), 64),
    **dict.fromkeys(("query_pre_attn_scalar",), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    **dict.fromkeys(("pad_token_id",), 0),  # what fills up is given no row, and a tied head never says it
    **dict.fromkeys(("laurel_rank", "altup_num_inputs"), 2),
    **dict.fromkeys(("num_kv_shared_layers",), 2),
    **dict.fromkeys(("zero_expert_num",), 1),
    **dict.fromkeys(("use_mamba_kernels", "use_cache_kernels"), False),
}
# And those of parts that read images or sound.
_SEEING: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("embed_dim", "out_hidden_size"), 32),
    **{"image_size": 28, "patch_size": 14},
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# What some types need besides, as their sizes hang together.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "mamba_n_heads": 4, "attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "falcon_mamba": {"intermediate_size": 64, "hidden_size": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "jetmoe": {"num_attention_heads": 4, "kv_channels": 8, "num_key_value_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"], "n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "num_attention_heads": 4},
    "zamba": {
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_expand": 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64, "qk_dim_factor": 1.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTARY)},
    "longcat_flash": {"num_hidden_layers": 10},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # The third layer is behind those that are run in a loop.
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        **{"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 3},
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2 + ["indexed_attention"],
        **{"num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1, "index_topk": 8},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8},
        **{"swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8, "swa_qk_rope_head_dim": 4},
        "shared_experts_intermediate_size": 16,
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {
        **{"per_layer_config": {}, "adapter_input_size": 32, "adapter_out_dim": 32},
        **{"conv_output_size": 64, "downsample_hidden_size": 16},
    },
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32},
        **{"heads_per_ngram": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8},
        "split_ngram_parts": 1,
    },
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 64, "num_buckets": 2},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_global_transformer": {"num_hidden_layers": LAYERS},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 8, "<image>": 9, "<|visual token 000000|>": 10}},
}
# The types that are saved by another class than the one that reads text: what that one saves nothing loads.
_SAVED_BY = dict.fromkeys(("emu3", "mllama", "internvl"), AutoModelForImageTextToText)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The settings of a type, small; of lists with an entry a layer the kinds that there are, in turn."""
    kind: Any = CONFIG_MAPPING[model_type]
    usual = kind()
    if isinstance(getattr(usual, "text_config", None), PretrainedConfig):
        return _around_text(usual)
    wanted = {name: value for name, value in _SMALL.items() if _has(usual, name)}
    wanted |= {name: _part(part) for name, part in _parts(usual)}
    for name, value in usual.to_dict().items():
        if isinstance(value, list) and name.endswith(("layer_types", "block_type", "layers_block_type")) and value:
            kinds = list(dict.fromkeys(value))
            wanted[name] = [kinds[place % len(kinds)] for place in range(LAYERS)]
    if "qk_rope_head_dim" in wanted and "head_dim" in wanted:
        wanted["head_dim"] = 4
    heads = usual.to_dict()  # which may differ from layer to layer, where an attribute tells none
    if "num_key_value_heads" in wanted and heads["num_key_value_heads"] == heads.get("num_attention_heads"):
        wanted["num_key_value_heads"] = 4
    if hasattr(usual, "is_decoder"):
        wanted |= {"is_decoder": True, "is_encoder_decoder": False}
    return kind(**{**wanted, "tie_word_embeddings": False, **_OWN.get(model_type, {})})


def _around_text(usual: Any) -> PretrainedConfig:
    """Small settings of a model that has its text model inside."""
    parts = {
        name: tiny_config(part.model_type) if name == "text_config" else _part(part) for name, part in _parts(usual)
    }
    marks = {name: VOCABULARY - 7 for name in usual.to_dict() if re.fullmatch(r"\w+_token_(id|index)", name)}
    marks = {name: value for name, value in marks.items() if not name.startswith(("bos", "eos", "pad"))}
    own = _OWN.get(usual.model_type, {})
    small: PretrainedConfig = type(usual)(**{**parts, **marks, "tie_word_embeddings": False, **own})
    return small


def _parts(usual: Any) -> list[tuple[str, Any]]:
    """The settings inside others, by name."""
    found = [(name, getattr(usual, name, None)) for name in type(usual).sub_configs]
    return [(name, part) for name, part in found if isinstance(part, PretrainedConfig)]


def _part(part: Any) -> Any:
    """Small settings of a part that reads no text."""
    wanted = {name: value for name, value in (_SMALL | _SEEING).items() if _has(part, name)}
    return type(part)(**(wanted | _OWN.get(part.model_type, {})))


def _has(config: PretrainedConfig, name: str) -> bool:
    return name in config.to_dict() or name in inspect.signature(type(config).__init__).parameters


def tiny(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a type, with changes of its settings, in float32 and evaluation mode.

    Its norms and biases are no ones and zeros, and its head is loud enough for answers that are certain.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model: PreTrainedModel = _SAVED_BY.get(model_type, AutoModelForCausalLM).from_config(config).eval().float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.weight.data *= 3
    return model


def save_type(directory: Path, model_type: str, **changes: Any) -> Path:
    """A tiny checkpoint of a type, with a tokenizer that transformers reads back as it is."""
    model = tiny(model_type, **changes)
    model.config.eos_token_id = 1
    if model.generation_config is not None:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    if not AutoTokenizer.from_pretrained(directory)("ba")["input_ids"]:  # a class of its own reads it
        tiny_qwen2_tokenizer().save_pretrained(directory)
    return directory


def unlike_decoders() -> dict[str, str]:
    """The types that are not tried, and why."""
    found = {}
    for model_type in model_types():
        try:
            if CONFIG_MAPPING[model_type]().is_encoder_decoder:
                found[model_type] = "half of an encoder-decoder model"
                continue
            with torch.device("meta"):
                size = sum(
                    one.numel() for one in AutoModelForCausalLM.from_config(tiny_config(model_type)).parameters()
                )
        except Exception as error:  # whatever a class makes of settings that are not its own
            found[model_type] = f"cannot be built small: {' '.join(str(error).split())[:120]}"
            continue
        if size > _LARGEST:
            found[model_type] = f"cannot be built small: {size:,} weights, as its parts have settings of their own"
    return found


def model_types() -> list[str]:
    """All types that transformers loads as causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
