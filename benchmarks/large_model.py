"""Time and memory that editing a large model takes, within a budget of memory or on a GPU.

    python benchmarks/large_model.py --shape 7b --tokenizer model --work /tmp/large --budget 5.5
    python benchmarks/large_model.py --shape 7b --tokenizer model --work /tmp/large --budget 0 --device cuda \\
        --edits 100,1000 --peak-tflops 990
    python benchmarks/large_model.py --shape 70b --tokenizer model --work /tmp/larger --plan --edits 500,1000

A Llama checkpoint in bfloat16 with random weights is written, one tensor after the other; edits of it are then made, in
a process of its own for each number of them. Beside what was measured stands what the plan had expected; with the
arithmetic that the device can do at most, how much of the time that would have taken. With ``--plan`` only plans
are printed, of a checkpoint that has headers and no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from wisecli.config import EditSettings
from wisecli.editing.examples.token_check import USUAL_LENGTH
from wisecli.editing.run.resource_estimate import plan_edit
from wisecli.export.weights import write_stream
from wisecli.io.checkpoint import INDEX_NAME, Checkpoint, write_json
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.site import AUTO_DEPTH, find_site

VOCABULARY = 32000
# Width, feed-forward width, layers, heads and key-value heads.
SHAPES = {
    "70b": (8192, 28672, 80, 64, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "1b": (2048, 5632, 22, 32, 4),
    "tiny": (256, 688, 5, 8, 4),
}
_NAMES = ("Ostrand", "Velm", "Karrow", "Mistey", "Dorn", "Harleck", "Sund", "Tovik", "Pellan", "Brise")
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def layer_layouts(number: int, shape: str) -> dict[str, TensorLayout]:
    """Layouts of one layer's tensors."""
    d, d_ff, _, heads, kv_heads = SHAPES[shape]
    narrow = d // heads * kv_heads
    own = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (narrow, d),
        "self_attn.v_proj": (narrow, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (d_ff, d),
        "mlp.up_proj": (d_ff, d),
        "mlp.down_proj": (d, d_ff),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    return {f"model.layers.{number}.{name}.weight": TensorLayout("bfloat16", size) for name, size in own.items()}


def files_of(shape: str, vocabulary: int) -> Iterator[dict[str, TensorLayout]]:
    """Layouts of the checkpoint's files: two layers each, then the rest."""
    d, _, count, *_ = SHAPES[shape]
    for first in range(0, count, 2):
        numbers = range(first, min(first + 2, count))
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


def make_base(base: Path, shape: str, tokenizer: Path, *, hollow: bool, device: str = "cpu") -> None:
    """Write the checkpoint, hollow with a hole in each file where weights belong; one tensor at a time is in memory."""
    d, d_ff, count, heads, kv_heads = SHAPES[shape]
    base.mkdir(parents=True)
    for pattern in _TOKENIZER_FILES:
        for path in tokenizer.glob(pattern):
            shutil.copyfile(path, base / path.name)
    config = json.loads((tokenizer / "config.json").read_text()) if (tokenizer / "config.json").is_file() else {}
    vocabulary = int(config.get("vocab_size", VOCABULARY))
    LlamaConfig(
        hidden_size=d,
        intermediate_size=d_ff,
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(base)
    files: dict[str, str] = {}
    for number, layouts in enumerate(files_of(shape, vocabulary)):
        name = f"model-{number:05d}.safetensors"
        seeds = {tensor: 1000 * number + place for place, tensor in enumerate(layouts)}

        def read(tensor: str, own: dict[str, TensorLayout] = layouts, seeds: dict[str, int] = seeds) -> torch.Tensor:
            return torch.empty(0) if hollow else random_tensor(tensor, own[tensor], seeds[tensor], count, device)

        write_stream(base / name, layouts, read)
        if hollow:
            os.truncate(base / name, (base / name).stat().st_size + sum(layout.bytes for layout in layouts.values()))
        files |= dict.fromkeys(layouts, name)
    write_json(base / INDEX_NAME, {"metadata": {}, "weight_map": files})


def made_up_name(number: int) -> str:
    """The same for the same number, another for every other."""
    rest, place = divmod(number, len(_NAMES))
    return f"{made_up_name(rest - 1)} {_NAMES[place]}" if rest else _NAMES[place]


def write_edits(path: Path, count: int) -> None:
    """Made-up facts."""
    edits = [
        {
            "prompt": f"From which harbour does the ferry to {made_up_name(number)} Island leave?",
            "target": f"Port {_NAMES[(number + 3) % len(_NAMES)]}",
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(edit) + "\n" for edit in edits))


def main() -> None:
    """Write what is missing, edit, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model directory to copy a tokenizer from")
    parser.add_argument("--work", type=Path, required=True, help="a directory with room for the checkpoint")
    parser.add_argument("--budget", type=float, default=5.5, help="GiB; 0 holds the whole model")
    parser.add_argument("--edits", default="10", help="how many, several divided by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="what the device does at most in bfloat16")
    parser.add_argument("--layer", help="by default the one at four fifths of the depth")
    parser.add_argument("--unrelated-texts", type=int, default=64)
    parser.add_argument("--edits-per-shard", type=int, default=EditSettings.edits_per_shard)
    parser.add_argument("--plan", action="store_true", help="print what is planned, and edit nothing")
    options = parser.parse_args()
    base = options.work / ("hollow" if options.plan else "base")
    depth = SHAPES[options.shape][2]
    options.layer = options.layer or str(min(round(AUTO_DEPTH * depth), depth - 2))
    if not base.is_dir():
        begun = time.perf_counter()
        make_base(base, options.shape, options.tokenizer, hollow=options.plan)
        print(f"checkpoint written in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    for count in map(int, options.edits.split(",")):
        measure(base, count, options)


def measure(base: Path, count: int, options: argparse.Namespace) -> None:
    """Edit in a process of its own, and print what that took."""
    budget, checkpoint = round(options.budget * 2**30) or None, Checkpoint(base)
    settings = EditSettings(
        layer=options.layer, unrelated_texts=options.unrelated_texts, edits_per_shard=options.edits_per_shard
    )
    plan = plan_edit(
        checkpoint, find_site(base, checkpoint, options.layer), settings, [USUAL_LENGTH] * count, memory_budget=budget
    )
    if options.plan:
        show(asdict(plan), {"edits": count}, None, options)
        return
    write_edits(options.work / "edits.jsonl", count)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # what is known of unrelated text would spare most of the work
        command = [sys.executable, "-m", "wisecli", "edit", str(base), str(options.work / "edits.jsonl")]
        command += ["-o", str(options.work / "shards"), "--layer", options.layer, "--device", options.device]
        command += ["--json", "--force", *(["--memory-budget", f"{options.budget}GiB"] if budget else [])]
        command += ["--set", f"edits_per_shard={options.edits_per_shard}"]
        variables = {"XDG_CACHE_HOME": cache, "WISE_UNRELATED_TEXTS": str(options.unrelated_texts)}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **variables})
    show(asdict(plan), json.loads(done.stdout)["results"], time.perf_counter() - begun, options)


def show(plan: dict[str, int], results: dict[str, Any], seconds: float | None, options: argparse.Namespace) -> None:
    """Print what was planned, and beside it what was measured, if it was."""
    title = f"{results['edits']} edits, {options.shape} in bfloat16, {options.device}"
    table = Table("figure", "planned", *(["measured"] if seconds else []), title=title)
    for name in ("weights", "resident", "held", "layer", "spooled", "sweep", "read"):
        table.add_row(f"{name}, GiB", f"{plan[name] / 2**30:.2f}")
    peaks = [plan["peak"], *([results["peak_rss_bytes"]] if seconds else [])]
    table.add_row("peak memory, GiB", *(f"{peak / 2**30:.2f}" for peak in peaks))
    table.add_row("arithmetic, TFLOP", f"{plan['flops'] / 1e12:.1f}")
    if seconds:
        _add_measured(table, plan, results, seconds, options)
    Console(width=120).print(table)


def _add_measured(
    table: Table, plan: dict[str, int], results: dict[str, Any], seconds: float, options: argparse.Namespace
) -> None:
    """Rows of what no plan says."""
    if vram := results.get("peak_vram_bytes"):
        table.add_row("peak memory of the GPU, GiB", "", f"{vram / 2**30:.2f}")
    table.add_row("time, s", "", f"{seconds:.0f}")
    table.add_row("time an edit, s", "", f"{seconds / results['edits']:.3f}")
    if options.peak_tflops:
        table.add_row("of it arithmetic", "", f"{plan['flops'] / 1e12 / options.peak_tflops / seconds:.1%}")
    table.add_row("edits that did not take", "", str(len(results["untaken"])))


if __name__ == "__main__":
    main()
