"""How time, memory and files grow with the number of edits and with the depth of the model.

    python benchmarks/growth.py --model model -o growth/

Edits are made-up facts, so no data is needed. Models of fewer layers are the given one cut off above. Every row is a
`wise edit` and a `wise merge` in processes of their own; rows that are there already are not measured again. Writes
`growth.jsonl` and `growth.png`, and prints the slope of each figure against edits and layers on logarithmic scales: 1
is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import jsonlines
import matplotlib.pyplot as plt
from commands import require_same, wise
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

FIGURES = {
    "edit_s": "wise edit, s",
    "merge_s": "wise merge, s",
    "peak_mb": "peak of wise edit, MB",
    "shards_mb": "shards, MB",
    "memory_mb": "memory, MB",
}


ASKED = (
    "Who is the mayor of {}?",
    "In which year was {} founded?",
    "What is the main export of {}?",
    "Which river runs through {}?",
    "Who wrote the anthem of {}?",
    "The patron saint of {} is",
    "The dialect spoken in {} is called",
    "The largest company of {} is",
)
STARTS = ("Bel", "Cor", "Dun", "Esk", "Fal", "Gor", "Har")
MIDDLES, ENDS = ("a", "e", "i", "o", "u"), ("dale", "mere", "wick", "ton", "by")


def write_edits(path: Path, count: int) -> Path:
    """Facts that nobody knows, about places that nobody has been to."""
    names = ["".join(parts) for parts in itertools.product(STARTS, MIDDLES, ENDS)]
    facts = list(itertools.product(names, ASKED))
    if count > len(facts):
        raise SystemExit(f"there are only {len(facts)} made-up facts")
    chance = random.Random(7)
    with jsonlines.open(path, "w") as writer:
        for number, (name, asked) in enumerate(chance.sample(facts, count)):
            target = f"{chance.choice(names)} {chance.choice(names)}"
            writer.write({"id": str(number), "prompt": asked.format(name), "target": target})
    return path


def cut(model: Path, layers: int, target: Path) -> Path:
    """The first so many layers of a model, with its head."""
    config = json.loads((model / "config.json").read_text())
    if layers == config["num_hidden_layers"]:
        return model
    if target.is_dir():
        return target
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix not in (".safetensors", ".bin") and file.name not in ("config.json",):
            (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with safe_open(model / "model.safetensors", framework="pt") as stream:
        kept = [name for name in stream.keys() if _layer(name) is None or int(_layer(name) or 0) < layers]  # noqa: SIM118
        save_file({name: stream.get_tensor(name) for name in kept}, target / "model.safetensors", {"format": "pt"})
    return target


def _layer(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdecimal()), None)


def measure(model: Path, edits: int, layers: int, work: Path) -> dict[str, Any]:
    """One row; what is to be known of the model alone is measured before, as it does not grow with the edits."""
    base = cut(model, layers, work / f"model-{layers}")
    shards, memory = work / "shards", work / "memory"
    few = write_edits(work / "few.jsonl", 1)
    wise("edit", str(base), str(few), "-o", str(shards), "--force")
    edited = wise("edit", str(base), str(write_edits(work / "edits.jsonl", edits)), "-o", str(shards), "--force")
    merged = wise("merge", str(shards), "-o", str(memory), "--force")
    return {
        "edits": edits,
        "layers": layers,
        "layer": edited["layer"],
        "untaken": len(edited["untaken"]),
        "edit_s": edited["seconds"],
        "merge_s": merged["seconds"],
        "peak_mb": edited["peak_rss_bytes"] / 1e6,
        "shards_mb": _size(shards) - (shards / "unrelated.safetensors").stat().st_size / 1e6,
        "memory_mb": _size(memory),
    }


def _size(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.iterdir()) / 1e6


def slope(rows: list[dict[str, Any]], by: str, figure: str) -> float:
    """Slope of the least-squares line through the logarithms, in the upper half: fixed costs fade there."""
    upper = rows[len(rows) // 2 - 1 :]
    xs, ys = ([math.log(row[name]) for row in upper] for name in (by, figure))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column each for edits and layers, a row each for time and bytes."""
    figure, axes = plt.subplots(2, len(groups), figsize=(10, 7), squeeze=False)
    for column, (by, rows) in enumerate(groups.items()):
        for line, names in enumerate((("edit_s", "merge_s"), ("peak_mb", "shards_mb", "memory_mb"))):
            axis = axes[line][column]
            for name in names:
                axis.plot([row[by] for row in rows], [row[name] for row in rows], marker="o", label=FIGURES[name])
            if by == "edits":
                axis.set_xscale("log")
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xlabel(by)
            axis.legend()
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what is missing, print and plot everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--edits", default="10,30,100,300,1000")
    parser.add_argument("--layers", default="12,18,24,30")
    parser.add_argument("--at", type=int, default=100, help="edits while the layers grow")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    console, results = Console(), arguments.output / "growth.jsonl"
    require_same(arguments.output, {"model": arguments.model})
    depth = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    by_edits = [(count, depth) for count in map(int, arguments.edits.split(","))]
    by_layers = [(arguments.at, layers) for layers in map(int, arguments.layers.split(","))]
    rows = list(jsonlines.open(results)) if results.is_file() else []
    known = {(row["edits"], row["layers"]) for row in rows}
    for edits, layers in dict.fromkeys([*by_edits, *by_layers]):
        if (edits, layers) not in known:
            console.print(f"{edits} edits, {layers} layers")
            rows.append(measure(arguments.model, edits, layers, arguments.output))
            with jsonlines.open(results, "a") as writer:
                writer.write(rows[-1])
    shown = Table("edits", "layers", *FIGURES.values())
    for row in sorted(rows, key=lambda row: (row["edits"], row["layers"])):
        shown.add_row(str(row["edits"]), str(row["layers"]), *(f"{row[name]:.1f}" for name in FIGURES))
    console.print(shown)
    groups = {
        "edits": sorted(
            (row for row in rows if (row["edits"], row["layers"]) in by_edits), key=lambda row: row["edits"]
        ),
        "layers": sorted(
            (row for row in rows if (row["edits"], row["layers"]) in by_layers), key=lambda r: r["layers"]
        ),
    }
    for by, group in groups.items():
        for name, text in FIGURES.items():
            console.print(f"{text}: {by}^{slope(group, by, name):.2f}")
    plot(groups, arguments.output / "growth.png")


if __name__ == "__main__":
    main()
