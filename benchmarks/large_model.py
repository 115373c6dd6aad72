"""Time and memory that a large model takes: to be edited within a budget of memory, and to be exported.

    python benchmarks/large_model.py edit --shape 7b --tokenizer model --work /tmp/large --budget 5.5
    python benchmarks/large_model.py edit --shape 70b --tokenizer model --work /tmp/larger --plan --edits 500,1000
    python benchmarks/large_model.py export --gigabytes 8 --work /tmp/large

A Llama checkpoint in bfloat16 with random weights is written, one tensor after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from runner import Row, ferries, run, show, wise, write_lines
from transformers import LlamaConfig

from wisecli.artifacts.memory_manifest import Manifest, write_memory
from wisecli.config import EditSettings
from wisecli.editing.examples.token_check import USUAL_LENGTH
from wisecli.editing.run.resource_estimate import plan_edit
from wisecli.edits.record import Edit
from wisecli.environment import versions
from wisecli.export.weights import write_stream
from wisecli.io.checkpoint import INDEX_NAME, Checkpoint, write_json
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.site import AUTO_DEPTH, find_site, fingerprint
from wisecli.routing.memories.calibration import Calibration
from wisecli.routing.memories.side_memory import SideMemory

VOCABULARY = 32000
# Width, feed-forward width, layers, heads and key-value heads.
SHAPES = {
    "70b": (8192, 28672, 80, 64, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "1b": (2048, 5632, 22, 32, 4),
    "tiny": (256, 688, 5, 8, 4),
}
KEYS, EDITS = 900, 100  # of a made-up memory
EXPORTS = (("lookup", ""), ("lookup", "--link"), ("lookup", "--format delta"), ("matrix", "--format delta"),
           ("lookup", "--max-shard-size 1GB"), ("lookup", "--dtype float16"))  # fmt: skip
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def layer_layouts(number: int, shape: str) -> dict[str, TensorLayout]:
    """Layouts of one layer's tensors."""
    d, d_ff, _, heads, kv_heads = SHAPES[shape]
    narrow = d // heads * kv_heads
    own = {
        "self_attn.q_proj": (d, d),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (narrow, d)),
        "self_attn.o_proj": (d, d),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (d_ff, d)),
        "mlp.down_proj": (d, d_ff),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (d,)),
    }
    return {f"model.layers.{number}.{name}.weight": TensorLayout("bfloat16", size) for name, size in own.items()}


def files_of(shape: str, layers: int, vocabulary: int) -> Iterator[dict[str, TensorLayout]]:
    """Layouts of the checkpoint's files: two layers each, then the rest."""
    d = SHAPES[shape][0]
    for first in range(0, layers, 2):
        numbers = range(first, min(first + 2, layers))
        yield {name: layout for number in numbers for name, layout in layer_layouts(number, shape).items()}
    yield {
        "model.embed_tokens.weight": TensorLayout("bfloat16", (vocabulary, d)),
        "model.norm.weight": TensorLayout("bfloat16", (d,)),
        "lm_head.weight": TensorLayout("bfloat16", (vocabulary, d)),
    }


def random_tensor(name: str, layout: TensorLayout, seed: int, depth: int, device: str = "cpu") -> torch.Tensor:
    """Weights at which activations neither vanish nor explode; what joins the residual stream is smaller with depth.

    Drawn on a device, which a GPU does a hundred times as fast; they differ from device to device.
    """
    if "norm" in name:
        return torch.ones(layout.shape, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    scale = 1.0 if "embed" in name else layout.shape[-1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * depth) ** -0.5
    drawn = torch.empty(layout.shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return drawn.mul_(scale).cpu()


def copy_tokenizer(tokenizer: Path, base: Path) -> dict[str, Any]:
    """Copy a tokenizer's files, and return its model's config."""
    for pattern in _TOKENIZER_FILES:
        for path in tokenizer.glob(pattern):
            shutil.copyfile(path, base / path.name)
    file = tokenizer / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


def make_base(
    base: Path, shape: str, tokenizer: Path | None, *, hollow: bool, device: str = "cpu", layers: int | None = None
) -> None:
    """Write the checkpoint, one tensor at a time.

    Hollow, it has a hole in each file where weights belong. Given ``layers`` it has so many, and the same noise in all.
    """
    d, d_ff, depth, heads, kv_heads = SHAPES[shape]
    count = layers or depth
    base.mkdir(parents=True)
    config = {} if tokenizer is None else copy_tokenizer(tokenizer, base)
    vocabulary = int(config.get("vocab_size", VOCABULARY))
    LlamaConfig(
        hidden_size=d, intermediate_size=d_ff, num_hidden_layers=count, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"), architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(base)  # fmt: skip
    noise = torch.randn(d * d_ff if layers else 0, generator=torch.Generator().manual_seed(0)).bfloat16()
    files: dict[str, str] = {}
    for number, layouts in enumerate(files_of(shape, count, vocabulary)):
        name = f"model-{number:05d}.safetensors"
        seeds = {tensor: 1000 * number + place for place, tensor in enumerate(layouts)}

        def read(tensor: str, own: dict[str, TensorLayout] = layouts, seeds: dict[str, int] = seeds) -> torch.Tensor:
            size = torch.Size(own[tensor].shape).numel()
            if hollow:
                return torch.empty(0)
            if layers:
                return noise.repeat(-(-size // noise.numel()))[:size]
            return random_tensor(tensor, own[tensor], seeds[tensor], count, device)

        write_stream(base / name, layouts, read)
        if hollow:
            os.truncate(base / name, (base / name).stat().st_size + sum(layout.bytes for layout in layouts.values()))
        files |= dict.fromkeys(layouts, name)
    write_json(base / INDEX_NAME, {"metadata": {}, "weight_map": files})


def edit(options: Namespace) -> None:
    """Seconds and memory that edits of a large model take, in a process of its own for each number of them.

    Beside what was measured stands what the plan had expected. With --plan only plans are printed, of a checkpoint
    without weights.
    """
    base = options.work / ("hollow" if options.plan else "base")
    depth = SHAPES[options.shape][2]
    options.layer = options.layer or str(min(round(AUTO_DEPTH * depth), depth - 2))
    if not base.is_dir():
        begun = time.perf_counter()
        make_base(base, options.shape, options.tokenizer, hollow=options.plan)
        print(f"checkpoint written in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    for count in map(int, options.edits.split(",")):
        measure(base, count, options)


def measure(base: Path, count: int, options: Namespace) -> None:
    """Edit in a process of its own, and print what that took."""
    budget, checkpoint = round(options.budget * 2**30) or None, Checkpoint(base)
    settings = EditSettings(
        layer=options.layer, unrelated_texts=options.unrelated_texts, edits_per_shard=options.edits_per_shard
    )
    plan = plan_edit(
        checkpoint, find_site(base, checkpoint, options.layer), settings, [USUAL_LENGTH] * count, memory_budget=budget
    )
    if options.plan:
        report(asdict(plan), {"edits": count}, None, options)
        return
    write_lines(options.work / "edits.jsonl", ferries(count))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # what is known of unrelated text would spare most of the work
        command = ["edit", str(base), str(options.work / "edits.jsonl"), "-o", str(options.work / "shards"), "--force"]
        command += ["--layer", options.layer, "--device", options.device]
        command += ["--memory-budget", f"{options.budget}GiB"] if budget else []
        command += ["--set", f"edits_per_shard={options.edits_per_shard}"]
        variables = {"XDG_CACHE_HOME": cache, "WISE_UNRELATED_TEXTS": str(options.unrelated_texts)}
        results = wise(*command, environment=variables)
    report(asdict(plan), results, time.perf_counter() - begun, options)


def report(plan: dict[str, int], results: dict[str, Any], seconds: float | None, options: Namespace) -> None:
    """Print what was planned, and beside it what was measured, if it was."""
    rows: list[Row] = []

    def add(figure: str, planned: str | None, measured: str | None = None) -> None:
        rows.append({"figure": figure, "planned": planned, **({"measured": measured} if seconds else {})})

    for name in ("weights", "resident", "held", "layer", "spooled", "sweep", "read"):
        add(f"{name}, GiB", f"{plan[name] / 2**30:.2f}")
    peak = f"{results['peak_rss_bytes'] / 2**30:.2f}" if seconds else None
    add("peak memory, GiB", f"{plan['peak'] / 2**30:.2f}", peak)
    add("arithmetic, TFLOP", f"{plan['flops'] / 1e12:.1f}")
    if seconds:
        add("peak memory of the GPU, GiB", None, f"{results.get('peak_vram_bytes', 0) / 2**30:.2f}")
        add("time, s", None, f"{seconds:.0f}")
        add("time an edit, s", None, f"{seconds / results['edits']:.3f}")
        add("edits that did not take", None, str(len(results["untaken"])))
    title = f"{results['edits']} edits, {options.shape} in bfloat16, {options.device}"
    show(rows, options, title=title, width=120)


def lookup_tensors() -> dict[str, torch.Tensor]:
    """Return keys and residuals of a lookup, and one prompt an edit of eight tokens."""
    d, d_ff, *_ = SHAPES["7b"]
    every, tokens = torch.arange(EDITS), 8 * EDITS
    return {
        "whitened_keys": torch.randint(-127, 128, (KEYS, d_ff), dtype=torch.int8),
        "key_scales": torch.full((KEYS,), 1 / 127),
        "cosine_offset": torch.zeros(KEYS),
        "whitening_index": torch.arange(KEYS) % 2,
        "key_to_edit": torch.arange(KEYS) % EDITS,
        "directions": torch.randn(2, 256, d_ff).half(),
        "gains": torch.rand(2, 256),
        "floors": torch.ones(2),
        "residuals": torch.randn(KEYS, d).half(),
        "key_to_residual": torch.arange(KEYS),
        "late_interaction.proj_weight": torch.randn(2, 128, d),
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
    """Write a lookup of 100 edits, or one matrix on half the columns, with random numbers in the usual shapes."""
    d, d_ff, *_ = SHAPES["7b"]
    checkpoint = Checkpoint(base)
    site = find_site(base, checkpoint)
    if kind == "lookup":
        packed = SideMemory(lookup_tensors(), (0.3,) * EDITS, kind, state_layer=0)
    else:
        change = {"columns": torch.arange(0, d_ff, 2)[None], "delta": torch.randn(1, d, d_ff // 2)}
        packed = SideMemory(change, (0.3,))
    edits = tuple(Edit(f"edit {number}", f"prompt {number}", "target") for number in range(EDITS))
    calibration = Calibration(0.3, "false-alarm", 0.0, 0.0, {}, {})
    identity = fingerprint(base, checkpoint, site)
    owners = (tuple(edit.id for edit in edits),)
    memory.mkdir()
    write_memory(
        memory, Manifest(str(base), None, identity, site, packed, (calibration,), owners, {}, edits, versions())
    )


def export(options: Namespace) -> None:
    """Time and memory that `wise export` takes for a large sharded checkpoint: it copies, it never loads.

    A checkpoint in the shape of a 7B Llama, with as many layers as fill the gigabytes, is written in shards; a lookup
    and a matrix for it are made up, and each form is exported in a process of its own.
    """
    base = options.work / "base"
    if not base.is_dir():
        each = sum(layout.bytes for layout in layer_layouts(0, "7b").values())
        layers = max(2, round((options.gigabytes * 1e9 - 4 * VOCABULARY * SHAPES["7b"][0]) / each))
        make_base(base, "7b", None, hollow=False, layers=layers)
    rows: list[Row] = []
    for kind, flags in EXPORTS:
        memory = options.work / f"memory-{kind}"
        if not memory.is_dir():
            make_memory(memory, base, kind)
        target = str(options.work / "edited")
        results = wise("export", "--memory", str(memory), "-o", target, "--force", *flags.split())
        written, peak = results["bytes"] / 1e9, round(results["peak_rss_bytes"] / 2**20)
        figures = {"written GB": written, "s": results["seconds"], "peak MiB": peak}
        rows.append({"memory": kind, "flags": flags, **figures})
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    show(rows, options, title=f"{size / 1e9:.2f} GB in bfloat16", digits={"written GB": 2, "s": 1}, width=120)


def edit_options(parser: ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model directory to copy a tokenizer from")
    parser.add_argument("--work", type=Path, required=True, help="a directory with room for the checkpoint")
    parser.add_argument("--budget", type=float, default=5.5, help="GiB; 0 holds the whole model")
    parser.add_argument("--edits", default="10", help="how many, several divided by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layer", help="by default the one at four fifths of the depth")
    parser.add_argument("--unrelated-texts", type=int, default=64)
    parser.add_argument("--edits-per-shard", type=int, default=EditSettings.edits_per_shard)
    parser.add_argument("--plan", action="store_true", help="print what is planned, and edit nothing")


def export_options(parser: ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--work", type=Path, required=True, help="an empty directory with room for twice as much")


MEASURES = {"edit": (edit, edit_options), "export": (export, export_options)}

if __name__ == "__main__":
    run(__doc__, MEASURES)
