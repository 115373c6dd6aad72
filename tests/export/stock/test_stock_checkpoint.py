import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.gates import WIDTH, Keys, random_keys, write_keys
from support.helpers import random_rows, save_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from wisecli.errors import ModelError
from wisecli.export.stock.stock_checkpoint import MEMORY_TENSORS, require_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout
from wisecli.models.layout.site import Site, find_site

LAYER, HIDDEN = 2, 32
ROWS = [row.prompt for row in random_rows((5, 1), (9, 1), (12, 1), (7, 1))]


@dataclass(frozen=True)
class Written:
    base: Path
    path: Path
    site: Site
    keys: Keys
    blocks: int


def written(
    root: Path,
    architecture: str = "llama",
    *,
    keys: int = 5,
    packing: Packing | None = None,
    shard: str | None = None,
    behind_layer: bool = False,
) -> Written:
    base = save_tiny(root / "base", architecture, shard=shard)
    if architecture == "mistral":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    checkpoint = Checkpoint(base)
    layout = known_layout(base)
    site = find_site(base, checkpoint, LAYER, layout.behind_layers() if behind_layer else layout)
    drawn, output = random_keys(keys, HIDDEN), root / "stock"
    output.mkdir()
    blocks = write_keys(output, base, checkpoint, site, drawn, packing)
    return Written(base, output, site, drawn, blocks)


def load(path: Path, **named: object) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **named)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def opened_by_hook(base: Path, keys: Keys, tokens: tuple[int, ...], multiplier: float | None = None) -> Tensor:
    """The base model's logits, keys' residuals added to what leaves the edited layer."""
    model = load(base)
    if multiplier is None:
        multiplier = getattr(model.config, "residual_multiplier", 1.0)

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        states = output * torch.rsqrt(output.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        added = torch.zeros_like(output)
        for direction, offset, value in zip(keys.directions, keys.offsets, keys.values, strict=True):
            reading = (states * direction).sum(-1) + offset
            added += ((F.silu(reading) - F.silu(reading - WIDTH)) / WIDTH)[..., None] * value
        return output + multiplier * added

    model.get_submodule(f"model.layers.{LAYER}").register_forward_hook(hook)
    return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("architecture", ["llama", "granite", "mistral", "qwen2", "llama, tied"])
@torch.no_grad()
def test_a_stock_model_adds_what_its_blocks_say(tmp_path: Path, architecture: str) -> None:
    made = written(tmp_path, architecture)
    model = load(made.path)
    assert model.config.num_hidden_layers == 6
    assert model.config.model_type == ("granite" if architecture == "granite" else "llama")
    assert "auto_map" not in json.loads((made.path / "config.json").read_text())
    before = load(made.base)
    changed = 0
    for tokens in ROWS:
        found = model(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(found, opened_by_hook(made.base, made.keys, tokens), rtol=1e-4, atol=1e-4)
        changed += int(((found - before(input_ids=torch.tensor([tokens])).logits[0]).abs().amax(-1) > 1e-2).sum())
    assert changed


@pytest.mark.parametrize("architecture", ["llama", "granite", "mistral", "qwen2"])
@torch.no_grad()
def test_residuals_behind_a_layer_are_added_as_they_are(tmp_path: Path, architecture: str) -> None:
    made = written(tmp_path, architecture, behind_layer=True)
    require_stock(made.base, made.site)
    for tokens in ROWS:
        found = load(made.path)(input_ids=torch.tensor([tokens])).logits[0]
        expected = opened_by_hook(made.base, made.keys, tokens, multiplier=1.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_all_else_is_the_base_models_bit_for_bit(tmp_path: Path, shard: str | None) -> None:
    made = written(tmp_path, shard=shard)
    stored, found = (
        {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for place in (made.base, made.path)
    )
    for name, tensor in stored.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and int(parts[2]) > LAYER:
            parts[2] = str(int(parts[2]) + 1)
        assert torch.equal(found.pop(".".join(parts)), tensor)
    index = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == MEMORY_TENSORS} == found.keys()
    for name, tensor in found.items():
        if f"layers.{LAYER + 1}." not in name:
            assert name.endswith("_proj.bias")
            assert not tensor.any()
    assert not found[f"model.layers.{LAYER + 1}.self_attn.o_proj.weight"].any()


@torch.no_grad()
def test_without_keys_the_model_is_the_base_model(tmp_path: Path) -> None:
    made = written(tmp_path, keys=0)
    tokens = torch.tensor([ROWS[2]])
    assert torch.equal(load(made.path)(input_ids=tokens).logits, load(made.base)(input_ids=tokens).logits)


@torch.no_grad()
def test_more_keys_than_a_block_holds_take_more_blocks(tmp_path: Path) -> None:
    made = written(tmp_path, keys=70)
    assert made.blocks == 3
    model = load(made.path)
    assert model.config.num_hidden_layers == 8
    # A later block reads what the one before it has changed: only keys of one block are apart.
    first = written(tmp_path / "less", keys=32)
    assert torch.equal(
        model.model.layers[LAYER + 1].mlp.gate_proj.weight[:64],
        load(first.path).model.layers[LAYER + 1].mlp.gate_proj.weight,
    )


def test_weights_go_into_the_type_and_files_that_are_asked_for(tmp_path: Path) -> None:
    made = written(tmp_path, packing=Packing(dtype=torch.bfloat16, file_bytes=20_000))
    files = sorted(path.name for path in made.path.glob("*.safetensors"))
    assert len(files) > 3
    assert load(made.path).dtype == torch.bfloat16
    assert {tensor.dtype for name in files for tensor in load_file(made.path / name).values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    model = load(written(tmp_path).path)
    tokens = torch.tensor([ROWS[2]])
    cached = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        cached, model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    )


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "qwen3", "smollm3"])
def test_other_architectures_are_told_what_they_can_have(tmp_path: Path, architecture: str) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    site = find_site(base, Checkpoint(base), LAYER)
    with pytest.raises(ModelError, match=r"cannot be written as stock: .*; use --format routed, or merge"):
        require_stock(base, site)
    behind = find_site(base, Checkpoint(base), LAYER, known_layout(base).behind_layers())
    with pytest.raises(ModelError, match=r"cannot be written as stock: .*; use --format routed$"):
        require_stock(base, behind)


@pytest.mark.parametrize(
    ("architecture", "changed", "says"),
    [
        ("mistral", {"sliding_window": 8}, "slides over a window"),
        ("qwen2", {"use_sliding_window": True}, "slides over a window"),
        ("llama", {"hidden_act": "gelu"}, "has gelu"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_what_llama_cannot_be_is_refused(
    tmp_path: Path, architecture: str, changed: dict[str, object], says: str
) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    site = find_site(base, Checkpoint(base), LAYER)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ModelError, match=says):
        require_stock(base, site)
