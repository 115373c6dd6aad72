import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from support.blocks import tensors_by_name
from support.byte_level import CHATML, LAYER, VOCABULARY, save_stock, save_tokenizer, save_wide_stock
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM

from wisecli.errors import ModelError
from wisecli.export.gguf.gguf_file import GGUF_NAME, Quantization, write_gguf
from wisecli.export.gguf.gguf_tokenizer import _LLAMA3, tokenizer_data
from wisecli.export.gguf.modelfile import modelfile

gguf = pytest.importorskip("gguf")


def fields_of(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("quantize", ["f32", "f16", "q8_0"])
def test_the_file_holds_the_checkpoints_tensors(tmp_path: Path, quantize: Quantization) -> None:
    stock = save_stock(tmp_path)
    write_gguf(tmp_path / GGUF_NAME, stock, [LAYER + 1], quantize)
    reader = gguf.GGUFReader(tmp_path / GGUF_NAME)
    found = {tensor.name: tensor for tensor in reader.tensors}
    stored = {name: tensor for path in stock.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    wide = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[quantize]
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == wide
    assert kinds[f"blk.{LAYER + 1}.ffn_gate.weight"] == ("F32" if quantize == "f32" else "F16")
    assert kinds[f"blk.{LAYER + 1}.ffn_gate.bias"] == kinds["output_norm.weight"] == "F32"
    # Biases of zero are left out, and so is a head that is the embedding.
    assert "blk.1.ffn_gate.bias" not in found
    assert "output.weight" not in found
    assert sum(name.endswith(".attn_q.weight") for name in found) == 6
    for ours, theirs in (
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.o_proj", "attn_output"),
    ):
        for layer in range(6):
            tensor = found[f"blk.{layer}.{theirs}.weight"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            wanted = stored[f"model.layers.{layer}.{ours}.weight"].numpy()
            assert values.shape == wanted.shape
            np.testing.assert_allclose(values, wanted, atol={"f32": 0, "f16": 2e-2, "q8_0": 2e-2}[quantize])
    # llama.cpp rotates neighbours where transformers rotates halves.
    query = gguf.quants.dequantize(found["blk.1.attn_q.weight"].data, found["blk.1.attn_q.weight"].tensor_type)
    wanted = stored["model.layers.1.self_attn.q_proj.weight"].numpy()
    for head in range(4):
        for pair in range(4):
            for half in range(2):
                np.testing.assert_allclose(
                    query[head * 8 + 2 * pair + half], wanted[head * 8 + 4 * half + pair], atol=2e-2
                )


def test_the_file_says_what_the_model_and_its_tokenizer_are(tmp_path: Path) -> None:
    stock = save_stock(tmp_path)
    write_gguf(tmp_path / GGUF_NAME, stock, [LAYER + 1], "f16")
    fields = fields_of(gguf.GGUFReader(tmp_path / GGUF_NAME))
    config, tokenizer = json.loads((stock / "config.json").read_text()), AutoTokenizer.from_pretrained(stock)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == config["num_hidden_layers"] == 6
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == pytest.approx(config["rope_parameters"]["rope_theta"])
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCABULARY
    for token, number in tokenizer.get_vocab().items():
        assert tokens[number] == token
        assert types[number] == (3 if number < 3 else 1)
    assert set(types[len(tokenizer) :]) == {5}
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.chat_template"] == CHATML
    merges = json.loads((stock / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("architecture", ["llama", "granite"])
@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
def test_a_wider_stream_and_attention_of_blocks_are_held(
    tmp_path: Path, quantize: Quantization, architecture: str
) -> None:
    stock, own = save_wide_stock(tmp_path, architecture), [LAYER + 1, LAYER + 2]
    write_gguf(tmp_path / GGUF_NAME, stock, own, quantize)
    reader = gguf.GGUFReader(tmp_path / GGUF_NAME)
    fields, config = fields_of(reader), json.loads((stock / "config.json").read_text())
    assert fields[f"{architecture}.embedding_length"] == config["hidden_size"] == 64
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"{architecture}.{name}"] == 8
    assert fields[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(5e-7)
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    values = {name: gguf.quants.dequantize(one.data, one.tensor_type) for name, one in found.items()}
    stored = tensors_by_name(stock)
    inside = f"model.layers.{LAYER + 2}"
    assert kinds["blk.1.attn_q.weight"] == {"f32": "F32", "q8_0": "Q8_0"}[quantize]
    for ours, theirs in (
        ("self_attn.v_proj.weight", "attn_v.weight"),
        ("self_attn.v_proj.bias", "attn_v.bias"),
        ("self_attn.o_proj.weight", "attn_output.weight"),
        ("self_attn.o_proj.bias", "attn_output.bias"),
        ("input_layernorm.weight", "attn_norm.weight"),
        ("mlp.down_proj.weight", "ffn_down.weight"),
    ):
        name = f"blk.{LAYER + 2}.{theirs}"
        assert kinds[name] == ("F16" if quantize == "q8_0" and stored[f"{inside}.{ours}"].dim() > 1 else "F32")
        np.testing.assert_allclose(values[name], stored[f"{inside}.{ours}"].numpy(), rtol=1e-3, atol=1e-7)
    # llama.cpp rotates neighbours where transformers rotates halves, of biases as of weights.
    wanted = stored[f"{inside}.self_attn.q_proj.bias"].numpy().reshape(4, 2, 4).transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(values[f"blk.{LAYER + 2}.attn_q.bias"], wanted)
    # Of attention biases of zero there are none.
    names = {name for name in found if name.startswith("blk.") and ".attn_" in name and name.endswith(".bias")}
    assert names == {f"blk.{LAYER + 2}.attn_{part}.bias" for part in ("q", "v", "output")}


def _split(pattern: str) -> Any:
    first = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_rules_have_the_names_of_llama_cpp(tmp_path: Path) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": _split(_LLAMA3),
        "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
    }
    for name, pre in rules.items():
        save_tokenizer(tmp_path / name, pre)
        assert tokenizer_data(tmp_path / name, VOCABULARY).rules == name


@pytest.mark.parametrize(
    ("pre", "says"), [(pre_tokenizers.Whitespace(), "have no name"), (_split(r"\w+|."), "have no name")]
)
def test_other_tokenizers_are_refused(tmp_path: Path, pre: Any, says: str) -> None:
    save_tokenizer(tmp_path, pre)
    with pytest.raises(ModelError, match=says):
        tokenizer_data(tmp_path, VOCABULARY)


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**content, "model": {**content["model"], "byte_fallback": True}})
    )
    with pytest.raises(ModelError, match="no byte-level BPE"):
        tokenizer_data(tmp_path, VOCABULARY)


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="more tokens than"):
        tokenizer_data(tmp_path, 99)


def test_frequencies_of_llama_3_are_transformers_own(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    stock = save_stock(tmp_path, rope_parameters=rope, max_position_embeddings=4096, head_dim=16)
    write_gguf(tmp_path / GGUF_NAME, stock, [LAYER + 1], "f32")
    reader = gguf.GGUFReader(tmp_path / GGUF_NAME)
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    found = LlamaForCausalLM.from_pretrained(stock).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / factors, found, rtol=1e-5)


def test_ollama_is_told_the_template_and_the_end(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    text = modelfile(tmp_path, "model.gguf")
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    turn = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    told = "<|im_start|>system\n{{ .System }}<|im_end|>\n" + turn
    assert text.endswith(f'TEMPLATE """{{{{ if .System }}}}{told}{{{{ else }}}}{turn}{{{{ end }}}}"""\n')


def test_without_a_chat_template_prompts_are_completed(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=None)
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(tmp_path, "model.gguf")
