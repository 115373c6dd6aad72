"""Quantised bases are edited as they are loaded, and exported with their own files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.every_type import save_type
from support.loading import CPU
from support.served import EDITS, PROMPTS, export_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, TorchAoConfig

from wisecli.artifacts.memory_manifest import read_memory
from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.checkpoint.verify import verify
from wisecli.config import LoadOptions
from wisecli.errors import ModelError
from wisecli.evaluation.edited_model import attach
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import LayerSite
from wisecli.models.loading import load_model
from wisecli.models.running.generation import generate
from wisecli.models.streaming.memory_budget import sizes

# The largest number of eight bits.
_LARGEST = 448.0


def stored_in_eight_bits(directory: Path, *, block: int) -> Path:
    """A checkpoint with its linear maps in fp8, and a scale for every block of them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(tensor, block)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return declared(directory, settings)


def in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix in fp8, and the scales of its blocks."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scales = tiles.abs().amax((1, 3)) / _LARGEST
    whole = (tiles / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return whole[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales


def with_a_scale_a_row(directory: Path) -> Path:
    """A checkpoint with its linear maps in fp8 as compressed-tensors keeps them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors[name] = tensor.to(torch.bfloat16)
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / _LARGEST
            tensors |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.to(torch.bfloat16)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
    }
    settings |= {"quantization_status": "compressed"}
    return declared(directory, settings | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})


def cast_to_eight_bits(directory: Path, *, named: bool) -> Path:
    """A checkpoint of numbers of eight bits without any scales, which its config may name."""
    tensors = load_file(directory / "model.safetensors")
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(eight, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "dtype"}
    path.write_text(json.dumps(content | ({"dtype": "float8_e4m3fn"} if named else {})))
    return directory


def in_torchao(directory: Path) -> Path:
    """A checkpoint with its linear maps in int8, as torchao keeps them."""
    quantisation = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=settings, dtype=torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory)
    return directory


def declared(directory: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint whose config says how it is quantised."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dtype": "bfloat16", "quantization_config": settings}))
    return directory


def answers(path: Path, **named: Any) -> list[str]:
    """What transformers alone says of the prompts with a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **named).eval()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def require_edits(texts: list[str]) -> None:
    bare = [text.replace(" ", "") for text in texts]
    assert all(text.startswith(target.replace(" ", "")) for text, (_, target) in zip(bare, EDITS, strict=False))


STORED: dict[str, Callable[[Path], Path]] = {
    "fp8": lambda path: stored_in_eight_bits(path, block=16),
    "fp8, large blocks": lambda path: stored_in_eight_bits(path, block=128),
    "torchao": in_torchao,
    "compressed": with_a_scale_a_row,
}


@pytest.mark.parametrize("stored", STORED)
def test_its_facts_are_edited_and_its_own_files_exported(tmp_path: Path, stored: str) -> None:
    if stored == "compressed":
        pytest.importorskip("compressed_tensors")
    base = STORED[stored](save_type(tmp_path / "model", "llama"))
    exported = export_of(base, tmp_path)
    assert isinstance(read_memory(tmp_path / "memory").site, LayerSite)
    texts, plain = answers(exported), answers(base)
    require_edits(texts)
    assert texts[len(EDITS) :] == plain[len(EDITS) :]
    assert (exported / "model-base.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    settings = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (base, exported)]
    assert settings[0] == settings[1]
    assert verify(exported, model=str(base)).differences == ()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_mixture_that_is_stored_in_fp8_gives_the_same_when_it_is_streamed(tmp_path: Path, model_type: str) -> None:
    base = stored_in_eight_bits(save_type(tmp_path / "model", model_type), block=16)
    whole, streamed = (
        load_model(base, LoadOptions(device="cpu", memory_budget=budget), layers="model.layers") for budget in (None, 1)
    )
    assert streamed.stream is not None
    assert streamed.stream.written is not None
    assert any("experts" in path.name for path in streamed.stream.written.iterdir())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, expected = (one.model(input_ids=ids).logits for one in (streamed, whole))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_mixture_that_is_stored_in_fp8_is_edited_too(tmp_path: Path, model_type: str) -> None:
    base = save_type(tmp_path / "model", model_type)
    require_edits(answers(export_of(stored_in_eight_bits(base, block=16), tmp_path)))


@pytest.mark.parametrize(("model_type", "named"), [("llama", True), ("llama", False), ("deepseek_v3", True)])
def test_plain_numbers_of_eight_bits_are_run_in_sixteen(tmp_path: Path, model_type: str, named: bool) -> None:
    base = cast_to_eight_bits(save_type(tmp_path / "model", model_type), named=named)
    exported = export_of(base, tmp_path)
    texts = answers(exported)
    require_edits(texts)
    assert texts[len(EDITS) :] == answers(base, dtype=torch.bfloat16)[len(EDITS) :]
    assert (exported / "model-base.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert verify(exported, model=str(base)).differences == ()
    assert sizes(Checkpoint(base), "model.layers").item == 2


def test_plain_numbers_of_eight_bits_are_read_layer_by_layer(tmp_path: Path) -> None:
    cast_to_eight_bits(save_type(tmp_path, "llama"), named=True)
    whole = load_model(tmp_path, CPU)
    streamed = load_model(tmp_path, LoadOptions(device="cpu", memory_budget=1), layers="model.layers")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(streamed.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)


@pytest.mark.parametrize("declaration", [{}, {"quantization_config": {"quant_method": "unheard of"}}], ids=str)
def test_scales_that_would_be_left_aside_are_an_error(tmp_path: Path, declaration: dict[str, Any]) -> None:
    path = stored_in_eight_bits(save_type(tmp_path, "llama"), block=16) / "config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    path.write_text(json.dumps(content | declaration))
    with pytest.raises(ModelError, match=r"without .*_scale_inv and 34 more tensors; edit"):
        load_model(tmp_path, CPU)


def test_what_a_cpu_has_no_kernels_for_is_edited_as_plain_numbers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    base = with_a_scale_a_row(save_type(tmp_path / "model", "llama"))
    export_of(base, tmp_path)
    edited = attach(tmp_path / "memory", load=CPU)
    found = generate(edited.model, edited.tokenizer, list(PROMPTS), max_new_tokens=8)
    require_edits([edited.tokenizer.decode(tokens) for tokens in found])


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_its_weights_may_be_made_plain_numbers_as_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    exported = export_of(with_a_scale_a_row(save_type(tmp_path / "model", "llama")), tmp_path)
    require_edits(answers(exported, quantization_config=CompressedTensorsConfig(dequantize=True)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_quantiser_goes_on_top(tmp_path: Path, model_type: str) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    base = save_type(tmp_path / "model", model_type)
    exported = export_of(base, tmp_path)
    settings = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    texts, plain = (answers(path, quantization_config=settings, dtype=torch.bfloat16) for path in (exported, base))
    require_edits(texts)
    assert texts[len(EDITS) :] == plain[len(EDITS) :]


def test_what_is_saved_of_a_loaded_one_is_edited_still(tmp_path: Path) -> None:
    exported = export_of(stored_in_eight_bits(save_type(tmp_path / "model", "llama"), block=16), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "again")
    require_edits(answers(tmp_path / "again"))


def test_a_kind_that_cannot_be_loaded_here_is_refused_with_what_it_asks_for(tmp_path: Path) -> None:
    declared(save_type(tmp_path, "llama"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantised \('gptq'\).*(optimum|GPU|gptqmodel).*or edit the model it was"):
        load_model(tmp_path, CPU)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_its_layers_are_read_one_by_one_where_they_become_plain_numbers(tmp_path: Path, model_type: str) -> None:
    stored_in_eight_bits(save_type(tmp_path, model_type), block=16)
    whole = load_model(tmp_path, CPU)
    streamed = load_model(tmp_path, LoadOptions(device="cpu", memory_budget=1), layers="model.layers")
    assert streamed.stream is not None
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(streamed.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)


def test_elsewhere_they_are_not(tmp_path: Path) -> None:
    declared(save_type(tmp_path, "llama"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="leave out --memory-budget"):
        load_model(tmp_path, LoadOptions(device="cpu", memory_budget=1))


def test_its_weights_are_written_in_no_other_type(tmp_path: Path) -> None:
    export_of(stored_in_eight_bits(save_type(tmp_path / "model", "llama"), block=16), tmp_path)
    with pytest.raises(ModelError, match="quantised"):
        export(tmp_path / "memory", tmp_path / "other", load=CPU, weights=WeightFiles(dtype="float32"))
