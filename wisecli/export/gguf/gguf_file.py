"""A stock checkpoint as a file that llama.cpp runs, and a ``Modelfile`` by which Ollama does.

Weights keep the names and the order of rows that llama.cpp has for Llama and Granite. The blocks of the memory are
never stored in less than 16 bits: their gates read small differences.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wisecli.errors import ModelError
from wisecli.export.gguf.gguf_tokenizer import TokenizerData, tokenizer_data
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import class_config

Quantization = Literal["f32", "f16", "q8_0"]
GGUF_NAME = "model.gguf"
# Of a quantized row so many numbers share a scale.
_BLOCK = 32
_BIASES = (".mlp.gate_proj.bias", ".mlp.up_proj.bias", ".mlp.down_proj.bias")
_ATTENTION_BIASES = tuple(f".self_attn.{letter}_proj.bias" for letter in "qkvo")


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name and type there, and how it is read."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], NDArray[Any]]


def require_gguf(base: Path) -> None:
    """Check that a base model's tokenizer can be written, and that there is what writes it.

    Raises:
        ModelError: naming what is wrong.
    """
    _package()
    config = class_config(base)
    tokenizer_data(base, int(config.vocab_size))


def write_gguf(path: Path, stock: Path, memory: Sequence[int], quantize: Quantization) -> None:
    """Write a stock checkpoint as one file.

    Args:
        memory: the numbers of the blocks that are the memory.

    Raises:
        ModelError: ``gguf`` is not installed, or the checkpoint has a tokenizer or a setting that the file cannot hold.
    """
    gguf = _package()
    config = class_config(stock)
    checkpoint, data = Checkpoint(stock), tokenizer_data(stock, int(config.vocab_size))
    writer = gguf.GGUFWriter(None, config.model_type)
    _describe(writer, gguf, config, quantize)
    _describe_tokenizer(writer, data)
    entries = list(_entries(gguf, checkpoint, config, memory, quantize))
    for entry in entries:
        byte_shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
        quantized = entry.kind == gguf.GGMLQuantizationType.Q8_0
        size = {gguf.GGMLQuantizationType.F32: 4, gguf.GGMLQuantizationType.F16: 2}.get(entry.kind, 1)
        shape, kind = (byte_shape, np.uint8) if quantized else (entry.shape, np.float32)
        count = math.prod(byte_shape) if quantized else math.prod(entry.shape) * size
        writer.add_tensor_info(entry.name, shape, np.dtype(kind), count, raw_dtype=entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(gguf.quants.quantize(entry.read(), entry.kind))
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError("--format gguf needs the package gguf: pip install 'wisecli[demo]'") from None
    return gguf


def _describe(writer: Any, gguf: Any, config: Any, quantize: Quantization) -> None:
    """Write what the model is, as llama.cpp asks for it."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[quantize]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(int(config.vocab_size))
    if config.rope_parameters.get("rope_type", "default") not in ("default", "llama3"):
        raise ModelError(f"--format gguf knows no rotary positions of type {config.rope_parameters['rope_type']!r}")
    if config.model_type == "granite":
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_residual_scale(float(config.residual_multiplier))
        writer.add_logit_scale(float(config.logits_scaling))


def _describe_tokenizer(writer: Any, data: TokenizerData) -> None:
    """Write a tokenizer's vocabulary, merges and special tokens to the file's metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(data.rules)
    writer.add_token_list(data.tokens)
    writer.add_token_types(data.types)
    writer.add_token_merges(data.merges)
    for name, number in data.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(data.adds_bos)
    if data.chat_template is not None:
        writer.add_chat_template(data.chat_template)


def _entries(
    gguf: Any, checkpoint: Checkpoint, config: Any, memory: Sequence[int], quantize: Quantization
) -> Iterator[_Entry]:
    """Yield every tensor of the file, in the checkpoint's order; biases that are zero are left out."""
    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], int(config.num_hidden_layers))
    inside = tuple(f"model.layers.{number}." for number in memory)
    for name in checkpoint:
        if name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        own = name.startswith(inside)
        # Older versions of llama.cpp take a query's bias only where all heads together are as wide as the stream.
        spared = (*_BIASES, *_ATTENTION_BIASES) if not own else _ATTENTION_BIASES
        if name.endswith(spared) and not checkpoint.load(name).any():
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ModelError(f"--format gguf knows no place for the tensor {name}")
        shape = checkpoint.shape(name)
        kind = kinds.F32
        if len(shape) > 1 and quantize != "f32":
            kind = kinds.Q8_0 if quantize == "q8_0" and not own and shape[-1] % _BLOCK == 0 else kinds.F16
        yield _Entry(called, shape, kind, _reader(checkpoint, name, config))
    if config.rope_parameters.get("rope_type", "default") == "llama3":
        factors = _llama3_factors(config)
        yield _Entry("rope_freqs.weight", tuple(factors.shape), kinds.F32, factors.numpy)


def _reader(checkpoint: Checkpoint, name: str, config: Any) -> Callable[[], NDArray[Any]]:
    """Return a function that loads a tensor, with the rows of queries and keys in the order that llama.cpp rotates."""

    def read() -> NDArray[Any]:
        tensor = checkpoint.load(name).float()
        if ".self_attn.q_proj." in name:
            tensor = _interleaved(tensor, int(config.num_attention_heads))
        elif ".self_attn.k_proj." in name:
            tensor = _interleaved(tensor, int(config.num_key_value_heads))
        found: NDArray[Any] = tensor.contiguous().numpy()
        return found

    return read


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Return rows of a query or key projection with the halves of each head in turn: llama.cpp rotates neighbours."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config: Any) -> Tensor:
    """Return by what Llama 3 divides the frequency of each pair of dimensions: (head / 2,)."""
    rope = config.rope_parameters
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    window = float(rope["original_max_position_embeddings"])
    smooth = (window / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(lengths < window / high, 1.0, torch.where(lengths > window / low, factor, between))
    return found.float()
