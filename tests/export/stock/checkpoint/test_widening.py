import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.blocks import tensors_by_name
from support.helpers import random_rows, save_tiny
from support.tiny_models import TINY_CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from wisecli.errors import ModelError
from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks, DecoderBlock
from wisecli.export.stock.checkpoint.widening import Widening
from wisecli.export.stock.stock_checkpoint import write_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.site import find_site

LAYER, EXTRA = 2, 64
ROWS = [row.prompt for row in random_rows((5, 1), (9, 1), (12, 1))]


def widened(
    root: Path,
    architecture: str = "llama",
    *,
    config: PretrainedConfig | None = None,
    shard: str | None = None,
    packing: Packing | None = None,
    blocks: Sequence[DecoderBlock] = (),
) -> tuple[Path, Path]:
    """A tiny model, and that with more channels."""
    base, output = save_tiny(root / "base", architecture, shard=shard, config=config), root / "stock"
    if architecture == "mistral":
        stored = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**stored, "sliding_window": None}))
    output.mkdir()
    checkpoint = Checkpoint(base)
    write_stock(output, base, checkpoint, find_site(base, checkpoint, LAYER), AddedBlocks(blocks), EXTRA, packing)
    return base, output


def load(path: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("architecture", ["llama", "granite", "mistral", "qwen2", "llama, tied"])
@torch.no_grad()
def test_a_wider_stream_gives_the_same_logits(tmp_path: Path, architecture: str, shard: str | None) -> None:
    base, stock = widened(tmp_path, architecture, shard=shard)
    before, after = load(base), load(stock)
    assert after.config.hidden_size == 96
    assert after.config.head_dim == 8
    assert after.config.rms_norm_eps == pytest.approx(before.config.rms_norm_eps / 3)
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    for tokens in ROWS:
        ids = torch.tensor([tokens])
        assert apart(after(input_ids=ids).logits, before(input_ids=ids).logits) < 1e-5


@torch.no_grad()
def test_heads_of_a_size_of_their_own_keep_it(tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS["llama"])
    config.head_dim = 16
    config.attention_bias = True
    base, stock = widened(tmp_path, config=config)
    ids = torch.tensor([ROWS[1]])
    assert apart(load(stock)(input_ids=ids).logits, load(base)(input_ids=ids).logits) < 1e-5
    assert json.loads((stock / "config.json").read_text())["head_dim"] == 16


def test_norms_stay_in_full_precision_and_all_else_is_of_the_type_that_is_asked_for(tmp_path: Path) -> None:
    base, stock = widened(tmp_path, packing=Packing(dtype=torch.bfloat16, file_bytes=20_000))
    assert len(list(stock.glob("model-0*.safetensors"))) > 3
    stored, found = tensors_by_name(base), tensors_by_name(stock)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    for name, tensor in stored.items():
        factor = 3**-0.5 if "norm" in name else 1
        kept = found[name][tuple(slice(length) for length in tensor.shape)]
        torch.testing.assert_close(kept, (tensor * factor).to(kept.dtype), rtol=1e-6, atol=0)
        assert found[name].count_nonzero() == kept.count_nonzero()


@pytest.mark.parametrize(
    ("hidden", "heads", "extra", "width"), [(32, 4, 64, 96), (576, 9, 64, 864), (2048, 32, 1, 2080), (30, 3, 0, 30)]
)
def test_widths_are_those_that_heads_and_quantized_rows_divide(hidden: int, heads: int, extra: int, width: int) -> None:
    found = Widening.of({"hidden_size": hidden, "num_attention_heads": heads}, extra)
    assert found == Widening(hidden, width)
    assert found.changes == (extra > 0)


def test_without_extra_channels_nothing_changes() -> None:
    same, tensor = Widening(4, 4), torch.ones(4, dtype=torch.bfloat16)
    layout = TensorLayout("bfloat16", (4,))
    for name in ("model.norm.weight", "model.unheard_of.weight"):
        assert same.tensor(name, tensor) is tensor
        assert same.layout(name, layout) is layout
    assert torch.equal(same.unit_norm(), torch.ones(4))


def test_tensors_without_a_known_place_are_refused() -> None:
    wider = Widening(4, 32)
    for name in ("model.layers.0.self_attn.q_norm.weight", "norm"):
        with pytest.raises(ModelError, match=rf"the tensor {name}; use --format routed"):
            wider.tensor(name, torch.ones(4))
    for name, shape in (("lm_head.weight", (4, 5)), ("a.down_proj.weight", (5, 4)), ("lm_head.weight", (4,))):
        with pytest.raises(ModelError, match=r"4 channels were expected; use --format routed"):
            wider.layout(name, TensorLayout("float32", shape))


def test_a_checkpoint_with_other_tensors_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, output = save_tiny(tmp_path / "base"), tmp_path / "stock"
    output.mkdir()
    strange = {**tensors_by_name(base), f"model.layers.{LAYER}.self_attn.q_norm.weight": torch.ones(8)}
    save_file(strange, base / "model.safetensors")
    checkpoint = Checkpoint(base)
    with pytest.raises(ModelError, match=r"q_norm\.weight; use --format routed"):
        write_stock(output, base, checkpoint, find_site(base, checkpoint, LAYER), AddedBlocks(()), EXTRA)
    assert not list(output.iterdir())
