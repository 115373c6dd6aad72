import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.helpers import alone, random_rows, save_tiny
from support.loading import CPU
from support.tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint.export import export
from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.errors import ModelError
from wisecli.models import model_files
from wisecli.models.model_files import find_model, gguf_of
from wisecli.progress import NOTE, Event

gguf = pytest.importorskip("gguf")

ROWS = random_rows((1, 2), (4, 1), (9, 3))
QUICK = EditSettings(layer="2", unrelated_texts=16, residual_stop=0.2)
# How GGUF names a layer's tensors.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order that GGUF rotates them: the halves of a head, one row of each in turn."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, *, kind: str = "F32") -> Path:
    """A GGUF file of a llama whose tokens are bytes as GPT-2 spells them."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<end>", "Ġ", "Ġb", *(chr(33 + place) for place in range(VOCABULARY - 4))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (VOCABULARY - 2)])
    writer.add_token_merges(["Ġ b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    state = model.state_dict()
    tensors = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "output": state["lm_head.weight"],
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            tensors[f"blk.{layer}.{theirs}"] = interleaved(weight, heads[theirs]) if theirs in heads else weight
    quantised = gguf.GGMLQuantizationType[kind]
    for name, weight in tensors.items():
        values = np.ascontiguousarray(weight.detach().numpy())
        small = weight.dim() == 1 or kind == "F32"
        data = values if small else gguf.quants.quantize(values, quantised)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if small else quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setattr(model_files, "cache_path", lambda kind: tmp_path / "cache" / kind)
    return tmp_path / "cache" / "models"


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({"prompt": "bab", "target": "dod"}))
    return path


def test_a_gguf_file_becomes_the_model_that_it_was_written_from(tmp_path: Path, cache: Path) -> None:
    model = tiny_model("llama")
    file = write_gguf(tmp_path / "some.gguf", model)
    told: list[Event] = []
    directory = find_model(str(file), on_progress=told.append)
    assert directory.parent == cache
    assert [event.note for event in told if event.stage == NOTE] == [
        f"{file} is edited as plain float32 weights, which are kept in {directory}"
    ]
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert loaded.dtype == torch.float32
    for row in ROWS:
        torch.testing.assert_close(alone(loaded, row), alone(model, row), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(directory)("bab")["input_ids"]


def test_quantised_weights_are_as_gguf_itself_dequantises_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    directory = find_model(str(write_gguf(tmp_path / "some.gguf", model, kind="Q8_0")))
    stored = load_file(directory / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    weight = model.get_submodule("model.layers.2.mlp.down_proj").get_parameter("weight").detach()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert stored.dtype == torch.float32
    np.testing.assert_allclose(stored.numpy(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(stored, weight)


def test_a_file_is_converted_once_and_another_of_the_same_name_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "some.gguf", tiny_model("llama"))
    first = find_model(str(file))
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert find_model(str(file)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(file, tiny_model("llama", seed=1))
    assert find_model(str(file)) != first


@pytest.mark.parametrize("named", ["file", "directory"])
def test_edits_of_a_gguf_name_the_converted_directory_and_go_the_whole_way(
    tmp_path: Path, cache: Path, edits: Path, named: str
) -> None:
    (tmp_path / "model").mkdir()
    file = write_gguf(tmp_path / "model" / "some.gguf", tiny_model("llama"))
    given = file if named == "file" else file.parent
    edit(str(given), edits, tmp_path / "shards", QUICK, load=CPU)
    (converted,) = cache.iterdir()
    assert read_shard_directory(tmp_path / "shards").model == str(converted)
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings())
    merge([tmp_path / "shards"], tmp_path / "again", MergeSettings(), model=str(given))
    export(tmp_path / "memory", tmp_path / "edited", model=str(given))
    assert not list((tmp_path / "edited").glob("*.gguf"))


def test_safetensors_beside_a_gguf_are_preferred(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "some.gguf").write_bytes(b"")
    assert gguf_of(tmp_path / "model") is None
    assert find_model(str(tmp_path / "model")) == tmp_path / "model"


def test_a_gguf_that_is_none_is_refused_in_one_sentence(
    tmp_path: Path, cache: Path, edits: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, or so it says" * 10)
    assert run("edit", str(file), str(edits), "-o", str(tmp_path / "shards")) == 2
    assert "broken.gguf" in capsys.readouterr().err.splitlines()[-1]
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("files", "says"), [(["a.gguf", "b.gguf"], "name the one"), (["a-00001-of-00002.gguf"], "join them")]
)
def test_several_gguf_files_are_refused(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=says):
        find_model(str(tmp_path))


def test_pickled_weights_are_refused_with_the_way_out(
    tmp_path: Path, edits: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "model")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    capsys.readouterr()
    assert run("edit", str(base), str(edits), "-o", str(tmp_path / "shards")) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in said for word in ("pickled", "save_pretrained", "never read"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["single", "sharded"])
def test_a_checkpoint_is_edited_in_the_form_and_type_it_comes_in(
    tmp_path: Path, edits: Path, dtype: torch.dtype, shard: str | None
) -> None:
    base = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard is not None)
    edits.write_text(json.dumps({"prompt": "ba be", "target": "do"}))
    edit(str(base), edits, tmp_path / "shards", QUICK, load=CPU)
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings())
    export(tmp_path / "memory", tmp_path / "edited")
    stored = [
        tensor for path in (tmp_path / "edited").glob("model-*.safetensors") for tensor in load_file(path).items()
    ]
    assert {tensor.dtype for name, tensor in stored if name.endswith("down_proj.weight")} == {dtype}


def fake_hub(root: Path, repository: str, revisions: dict[str, int]) -> None:
    """What the hub's client leaves in its cache: a snapshot a commit, and what each branch or tag stands for."""
    place = root / f"models--{repository.replace('/', '--')}"
    for revision, seed in revisions.items():
        commit = f"{seed:040d}"
        save_tiny(place / "snapshots" / commit, seed=seed)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)


@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("main", 0), ("v2", 1), (f"{1:040d}", 1)])
def test_a_revision_of_a_hub_model_is_found_in_the_hubs_cache_offline(
    tmp_path: Path,
    edits: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., int],
    revision: str | None,
    seed: int,
) -> None:
    fake_hub(tmp_path / "hub", "someone/tiny", {"main": 0, "v2": 1})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    edits.write_text(json.dumps({"prompt": "ba be", "target": "do"}))
    chosen = ["--revision", revision] if revision else []
    assert run("edit", "someone/tiny", str(edits), "--layer", "2", *chosen) == 0
    shards = read_shard_directory(tmp_path / "shards")
    assert (shards.model, shards.revision) == ("someone/tiny", revision)
    directory = find_model("someone/tiny", revision=revision)
    assert directory == tmp_path / "hub" / "models--someone--tiny" / "snapshots" / f"{seed:040d}"
    assert run("merge", "shards") == 0
    assert run("export") == 0


def test_a_revision_that_the_cache_lacks_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(tmp_path / "hub", "someone/tiny", {"main": 0})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="someone/tiny"):
        find_model("someone/tiny", revision="v3")
