"""Memory and time that `wise export` takes for a large sharded checkpoint: it copies, it never loads.

    python benchmarks/export_memory.py --gigabytes 8 --work /tmp/large

A checkpoint in the shape of a 7B Llama, with random weights and as many layers as fill the gigabytes, is written in
shards; a lookup and a matrix for it are made up, and each form is exported in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from wisecli.artifacts.memory_manifest import Manifest, write_memory
from wisecli.edits.record import Edit
from wisecli.environment import versions
from wisecli.export.weights import write_stream
from wisecli.io.checkpoint import INDEX_NAME, Checkpoint, write_json
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.site import find_site, fingerprint
from wisecli.routing.memories.calibration import Calibration
from wisecli.routing.memories.side_memory import SideMemory

D, D_FF, VOCABULARY, KEYS, EDITS = 4096, 11008, 32000, 900, 100
_LAYER = {
    "self_attn.q_proj.weight": (D, D),
    "self_attn.k_proj.weight": (D, D),
    "self_attn.v_proj.weight": (D, D),
    "self_attn.o_proj.weight": (D, D),
    "mlp.gate_proj.weight": (D_FF, D),
    "mlp.up_proj.weight": (D_FF, D),
    "mlp.down_proj.weight": (D, D_FF),
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
}


def shards(layers: int) -> Iterator[dict[str, TensorLayout]]:
    """Layouts of the checkpoint's files: four layers each, then the rest."""
    for first in range(0, layers, 4):
        numbers = range(first, min(first + 4, layers))
        yield {
            f"model.layers.{number}.{name}": TensorLayout("bfloat16", shape)
            for number in numbers
            for name, shape in _LAYER.items()
        }
    yield {
        "model.embed_tokens.weight": TensorLayout("bfloat16", (VOCABULARY, D)),
        "model.norm.weight": TensorLayout("bfloat16", (D,)),
        "lm_head.weight": TensorLayout("bfloat16", (VOCABULARY, D)),
    }


def make_base(base: Path, gigabytes: float) -> None:
    """A checkpoint of about so many gigabytes in bfloat16."""
    each = 2 * sum(torch.Size(shape).numel() for shape in _LAYER.values())
    layers = max(2, round((gigabytes * 1e9 - 4 * VOCABULARY * D) / each))
    base.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=D_FF,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    noise = torch.randn(D, D_FF, generator=torch.Generator().manual_seed(0)).bfloat16()
    files: dict[str, str] = {}
    for number, layouts in enumerate(shards(layers)):
        name = f"model-{number:05d}.safetensors"
        write_stream(
            base / name,
            layouts,
            lambda tensor, own=layouts: noise.flatten().repeat(  # type: ignore[misc]
                -(-torch.Size(own[tensor].shape).numel() // noise.numel())
            )[: torch.Size(own[tensor].shape).numel()],
        )
        files |= dict.fromkeys(layouts, name)
    write_json(base / INDEX_NAME, {"metadata": {}, "weight_map": files})


def lookup_tensors() -> dict[str, torch.Tensor]:
    """Keys and residuals of a lookup, and one prompt an edit of eight tokens."""
    every, tokens = torch.arange(EDITS), 8 * EDITS
    return {
        "whitened_keys": torch.randn(KEYS, D_FF).half(),
        "cosine_offset": torch.zeros(KEYS),
        "whitening_index": torch.arange(KEYS) % 2,
        "key_to_edit": torch.arange(KEYS) % EDITS,
        "directions": torch.randn(2, 256, D_FF).half(),
        "gains": torch.rand(2, 256),
        "floors": torch.ones(2),
        "residuals": torch.randn(KEYS, D).half(),
        "key_to_residual": torch.arange(KEYS),
        "late_interaction.proj_weight": torch.randn(2, 128, D),
        "late_interaction.proj_bias": torch.zeros(2, 128),
        "late_interaction.logit_scale": torch.ones(2),
        "late_interaction.logit_offset": torch.zeros(2),
        "late_interaction.prompt_token_embeddings": torch.randn(2 * tokens, 128).half(),
        "late_interaction.token_to_prompt": torch.arange(2 * EDITS).repeat_interleave(8),
        "late_interaction.token_weights": torch.full((2 * tokens,), 1 / 8),
        "late_interaction.prompt_to_edit": every,
        "late_interaction.special_token_ids": torch.tensor([0]),
    }


def make_memory(memory: Path, base: Path, kind: str) -> None:
    """A lookup of 100 edits, or one matrix on half the columns, with random numbers in the usual shapes."""
    checkpoint = Checkpoint(base)
    site = find_site(base, checkpoint)
    if kind == "lookup":
        packed = SideMemory(lookup_tensors(), (0.3,) * EDITS, kind, state_layer=0)
    else:
        change = {"columns": torch.arange(0, D_FF, 2)[None], "delta": torch.randn(1, D, D_FF // 2)}
        packed = SideMemory(change, (0.3,))
    edits = tuple(Edit(f"edit {number}", f"prompt {number}", "target") for number in range(EDITS))
    calibration = Calibration(0.3, "false-alarm", 0.0, 0.0, {}, {})
    identity = fingerprint(base, checkpoint, site)
    owners = (tuple(edit.id for edit in edits),)
    memory.mkdir()
    write_memory(
        memory, Manifest(str(base), None, identity, site, packed, (calibration,), owners, {}, edits, versions())
    )


def main() -> None:
    """Make what is missing, export in every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--work", type=Path, required=True, help="an empty directory with room for twice as much")
    arguments = parser.parse_args()
    base = arguments.work / "base"
    if not base.is_dir():
        make_base(base, arguments.gigabytes)
    table = Table(title=f"{sum(path.stat().st_size for path in base.glob('*.safetensors')) / 1e9:.2f} GB in bfloat16")
    for name in ("memory", "flags", "written GB", "s", "peak MiB"):
        table.add_column(name, justify="left" if name in ("memory", "flags") else "right")
    ways = (("lookup", ""), ("lookup", "--link"), ("lookup", "--format delta"), ("matrix", "--format delta"),
            ("lookup", "--max-shard-size 1GB"), ("lookup", "--dtype float16"))  # fmt: skip
    for kind, flags in ways:
        memory = arguments.work / f"memory-{kind}"
        if not memory.is_dir():
            make_memory(memory, base, kind)
        command = [sys.executable, "-m", "wisecli", "export", "--memory", str(memory), "-o"]
        command += [str(arguments.work / "edited"), "--force", "--json", "-q", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        results = json.loads(done.stdout)["results"]
        figures = results["bytes"] / 1e9, results["seconds"], results["peak_rss_bytes"] / 2**20
        table.add_row(kind, flags, f"{figures[0]:.2f}", f"{figures[1]:.1f}", f"{figures[2]:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
