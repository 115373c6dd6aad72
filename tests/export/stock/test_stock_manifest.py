"""Checks of stock checkpoints with a wider stream, whose blocks' attention reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.blocks import random_block
from support.helpers import save_tiny
from transformers import AutoConfig

from wisecli.artifacts.file_names import MEMORY_TENSORS, MERGED
from wisecli.commands.checkpoint.verify import verify
from wisecli.export.routed.checkpoint import BASE_TENSORS
from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks
from wisecli.export.stock.stock_checkpoint import write_stock
from wisecli.export.stock.stock_manifest import check_around, check_blocks, is_wider, read_stock
from wisecli.io.checkpoint import Checkpoint, read_json, write_json
from wisecli.models.layout.architectures import known_layout
from wisecli.models.layout.site import find_site, fingerprint

LAYER, EXTRA, WIDTH = 2, 64, 96
BLOCK = f"model.layers.{LAYER + 1}"


@pytest.fixture(params=[False, True], ids=["in a matrix", "behind a layer"])
def places(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A tiny model, and a stock checkpoint of it with two blocks that read."""
    base, stock = save_tiny(tmp_path / "base"), tmp_path / "stock"
    stock.mkdir()
    checkpoint, layout = Checkpoint(base), known_layout(base)
    site = find_site(base, checkpoint, LAYER, layout.behind_layers() if request.param else layout)
    config = AutoConfig.from_pretrained(base)
    write_stock(
        stock,
        base,
        checkpoint,
        site,
        AddedBlocks(*([random_block(config, WIDTH, seed=seed)] for seed in (0, 1))),
        EXTRA,
    )
    content = {
        "format": "stock",
        "versions": {},
        "base": {"model": str(base), "revision": None, **fingerprint(base, checkpoint, site).as_dict()},
        "site": site.as_dict(),
        "gate": {"keys": 3, "blocks": 2, "last": 1},
        "edits": [],
    }
    write_json(stock / MERGED, content)
    return base, stock


def change(path: Path, name: str, value: Any = None) -> None:
    """Give one number of a tensor another value; without one, leave the tensor out."""
    tensors = load_file(path)
    if value is None:
        del tensors[name]
        index = read_json(path.parent / "model.safetensors.index.json")
        del index["weight_map"][name]
        write_json(path.parent / "model.safetensors.index.json", index)
    else:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


def wrong(places: tuple[Path, Path]) -> list[str | None]:
    """The tensors that differ from what a manifest and the base model say."""
    base, stock = places
    manifest = read_stock(stock)
    checks = (*check_blocks(stock, manifest), *check_around(stock, base, manifest))
    return [check.tensor for check in checks if check.state != "same"]


def test_a_wider_checkpoint_is_found_whole(places: tuple[Path, Path]) -> None:
    base, stock = places
    assert is_wider(stock, read_stock(stock))
    assert wrong(places) == []
    assert "differs" not in {check.state for check in verify(stock, model=str(base)).checks}


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        f"model.layers.{LAYER}.mlp.down_proj.weight",
        f"model.layers.{LAYER + 3}.input_layernorm.weight",
    ],
)
def test_changed_numbers_around_the_blocks_are_found(places: tuple[Path, Path], name: str) -> None:
    # The last number is one of an extra channel.
    change(places[1] / BASE_TENSORS, name, 1e-3)
    assert wrong(places) == [name]


def test_a_stream_of_another_width_than_the_tensors_have_is_found(places: tuple[Path, Path]) -> None:
    config = read_json(places[1] / "config.json")
    for width in (WIDTH + 32, 10**15, None):
        write_json(places[1] / "config.json", {**config, "hidden_size": width})
        assert wrong(places)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_blocks_that_are_not_whole_are_found(places: tuple[Path, Path], value: float | None) -> None:
    name = f"{BLOCK}.self_attn.o_proj.weight"
    assert load_file(places[1] / MEMORY_TENSORS)[name].any()
    change(places[1] / MEMORY_TENSORS, name, value)
    assert wrong(places) == [name]


def test_blocks_of_other_sizes_are_found(places: tuple[Path, Path]) -> None:
    tensors, name = load_file(places[1] / MEMORY_TENSORS), f"{BLOCK}.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(64, 32)}, places[1] / MEMORY_TENSORS, metadata={"format": "pt"})
    assert wrong(places) == [name]


def test_blocks_of_exports_that_name_none_behind_the_last_layer_stand_together(places: tuple[Path, Path]) -> None:
    manifest = read_stock(places[1])
    assert manifest.blocks(8) == [LAYER + 1, 7]
    content = read_json(places[1] / MERGED)
    del content["gate"]["last"]
    write_json(places[1] / MERGED, content)
    assert read_stock(places[1]).blocks(8) == [LAYER + 1, LAYER + 2]
