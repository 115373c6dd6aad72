from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks import computed, random_block, tensors_by_name
from support.helpers import random_rows, save_tiny
from support.tiny_models import TINY_CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks, DecoderBlock
from wisecli.export.stock.stock_checkpoint import write_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout
from wisecli.models.layout.site import find_site

LAYER, EXTRA, WIDTH = 2, 64, 96
ROWS = [row.prompt for row in random_rows((5, 1), (12, 1))]


def written(root: Path, blocks: list[DecoderBlock], *, behind_layer: bool = False, **named: Any) -> Path:
    output, base = root / "stock", root / "base"
    output.mkdir()
    checkpoint, layout = Checkpoint(base), known_layout(base)
    site = find_site(base, checkpoint, LAYER, layout.behind_layers() if behind_layer else layout)
    write_stock(output, base, checkpoint, site, AddedBlocks(blocks), EXTRA, **named)
    return output


def base_of(root: Path, architecture: str) -> Any:
    """The config of a tiny model."""
    config = deepcopy(TINY_CONFIGS[architecture])
    if architecture == "mistral":
        config.sliding_window = None
    return AutoConfig.from_pretrained(save_tiny(root / "base", architecture, config=config))


@pytest.mark.parametrize("behind_layer", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "granite", "mistral", "qwen2"])
@torch.no_grad()
def test_blocks_add_what_plain_torch_does(tmp_path: Path, architecture: str, behind_layer: bool) -> None:
    config = base_of(tmp_path, architecture)
    # The first one fills the extra channels, from which the others' attention reads.
    blocks = [random_block(config, WIDTH, seed=seed, reads=seed > 0) for seed in range(3)]
    stock = AutoModelForCausalLM.from_pretrained(written(tmp_path, blocks, behind_layer=behind_layer))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert stock.config.attention_bias
    for tokens in ROWS:
        ids = torch.tensor([tokens])
        states = base(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1]
        rotary = base.model.rotary_emb(states, torch.arange(len(tokens))[None])
        wanted = torch.nn.functional.pad(states[0], (0, EXTRA))
        found = stock.eval()(input_ids=ids, output_hidden_states=True).hidden_states
        for number, block in enumerate(blocks):
            without = wanted
            wanted = computed(block, wanted, config, rotary)
            assert (wanted - without).abs().mean() > 0.1
            assert (found[LAYER + 2 + number][0] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_a_block_leaves_out_is_nought_and_its_norms_read_as_the_bases_would(tmp_path: Path) -> None:
    base_of(tmp_path, "llama")
    stock = written(tmp_path, [DecoderBlock({})], packing=Packing(dtype=torch.bfloat16))
    found = {
        name.split(f".layers.{LAYER + 1}.")[1]: tensor
        for name, tensor in tensors_by_name(stock).items()
        if f".layers.{LAYER + 1}." in name
    }
    norms = [found.pop(f"{name}_layernorm.weight") for name in ("input", "post_attention")]
    wanted = torch.cat([torch.full((32,), (32 / WIDTH) ** 0.5), torch.ones(EXTRA)])
    for norm in norms:
        torch.testing.assert_close(norm, wanted)
    assert found["self_attn.k_proj.weight"].shape == (16, WIDTH)
    assert "self_attn.q_proj.bias" not in found
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mlp.up_proj.weight", r"up_proj\.weight has shape \(64, 32\), not \(64, 96\)"),
        ("mlp.other.weight", r"mlp\.other\.weight has shape \(64, 32\), not None"),
    ],
)
def test_tensors_of_other_shapes_or_names_are_refused(tmp_path: Path, name: str, says: str) -> None:
    base_of(tmp_path, "llama")
    with pytest.raises(ValueError, match=says):
        written(tmp_path, [DecoderBlock({name: torch.zeros(64, 32)})])
    assert not list((tmp_path / "stock").iterdir())
