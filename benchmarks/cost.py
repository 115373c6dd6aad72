"""What edits cost: time of an edited model beside its base's, and how time, memory and files grow with the edits.

python benchmarks/cost.py inference --base model --edited edited --edited edited-matrix
python benchmarks/cost.py inference --base model --edited edited --data edits.jsonl [--times 10]
python benchmarks/cost.py growth --model model -o growth/
"""

from __future__ import annotations

import json
import math
import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from multiplied import several
from runner import Row, made_up_edits, require_same, run, show, wise, write_lines
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, Cache, PreTrainedModel

from wisecli.edits.record import read_edits
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.routing.passes.token_cache import cache_returned

FIGURES = {
    "edit_s": "wise edit, s",
    "merge_s": "wise merge, s",
    "peak_mb": "peak of wise edit, MB",
    "shards_mb": "shards, MB",
    "memory_mb": "memory, MB",
}


def prefill(model: PreTrainedModel, rows: BatchEncoding) -> None:
    """One pass over whole prompts."""
    model(**rows, use_cache=False)


class Decode:
    """One more token a row after prompts that are in the cache; takes it out again."""

    def __init__(self) -> None:
        self.caches: dict[PreTrainedModel, Cache] = {}

    def __call__(self, model: PreTrainedModel, rows: BatchEncoding) -> None:
        """One step."""
        ids, mask = rows["input_ids"], rows["attention_mask"]
        if model not in self.caches:
            self.caches[model] = cache_returned(model(ids, attention_mask=mask, use_cache=True))
        longer = torch.cat([mask, mask[:, -1:]], 1)
        model(ids[:, -1:], attention_mask=longer, use_cache=True, **{CACHE_ARGUMENT: self.caches[model]})
        self.caches[model].crop(-1)


# Seconds of each run, by the way and the model's name.
Times = dict[tuple[str, str], list[float]]
# How each way runs, and how often a round.
Way = Callable[[PreTrainedModel, BatchEncoding], None]
WAYS: dict[str, tuple[Way, int]] = {
    "prefill": (prefill, 1),
    "decode": (Decode(), 10),
}


def seconds(way: Way, model: PreTrainedModel, rows: BatchEncoding) -> float:
    """Seconds of one run, the device's queue emptied before and after."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if rows["input_ids"].is_cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    way(model, rows)
    synchronize()
    return time.perf_counter() - started


def prompts(options: Namespace) -> BatchEncoding:
    """The rows that are asked, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(options.base, padding_side="left")
    if options.data is None:
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(len(tokenizer), (options.batch, options.tokens), generator=chance)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    edits = [edit for edit in read_edits(options.data) if edit.rephrases][: options.batch]
    asked = [edit.rephrases[0] for edit in edits]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows: BatchEncoding = tokenizer(asked, return_tensors="pt", padding=True)
    return rows


def timed(models: dict[str, PreTrainedModel], rows: BatchEncoding, rounds: int) -> Times:
    """Seconds of every run, the models in turn; a first round, not counted, warms up."""
    taken: Times = {}
    for turn in range(rounds + 1):
        for way, (once, times) in WAYS.items():
            for _ in range(times):
                for name, model in models.items():
                    spent = seconds(once, model, rows)
                    if turn:
                        taken.setdefault((way, name), []).append(spent)
    return taken


def milliseconds(taken: Times, way: str, name: str) -> float:
    """The median of a model's runs."""
    return median(taken[way, name]) * 1e3


def ratio(taken: Times, way: str, name: str, base: str) -> float:
    """The median of a model's times by the base's of the same turn."""
    return median(own / other for own, other in zip(taken[way, name], taken[way, base], strict=True))


@torch.no_grad()
def inference(options: Namespace) -> None:
    """What the routed layer costs at inference: base and edited checkpoints take turns in one process.

    Prompts are random tokens, or with --data the edits' first rephrases, so that many are answered by a memory. A pass
    over whole prompts decides them as well. With --times a lookup counts so many times, as if it held so many more
    edits. Every round times each model once, in turn; the ratios are the median of the rounds' ratios to the base.
    """
    models = {
        str(path): AutoModelForCausalLM.from_pretrained(path, trust_remote_code=path != options.base)
        .eval()
        .to(options.device)
        for path in (options.base, *(several(path, options.times) for path in options.edited))
    }
    rows = prompts(options).to(options.device)
    taken, shown = timed(models, rows, options.rounds), list[Row]()
    for name in models:
        times = {f"{way}, ms": milliseconds(taken, way, name) for way in WAYS}
        ratios = {f"{way}, × base": ratio(taken, way, name, str(options.base)) for way in WAYS}
        shown.append({"model": name, **times, **ratios})
    title = f"{options.batch} rows of {rows['input_ids'].shape[1]} tokens, {options.device}"
    show(shown, options, title=title, digits={f"{way}, ms": 1 for way in WAYS}, width=110)


def cut(model: Path, layers: int, target: Path) -> Path:
    """Return a model of the first so many layers of a model, with its head; it is written if it is not there."""
    config = json.loads((model / "config.json").read_text())
    if layers == config["num_hidden_layers"]:
        return model
    if not target.is_dir():
        target.mkdir(parents=True)
        for file in model.iterdir():
            if file.suffix not in (".safetensors", ".bin") and file.name != "config.json":
                (target / file.name).write_bytes(file.read_bytes())
        (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with safe_open(model / "model.safetensors", framework="pt") as stream:
            numbers = {name: re.findall(r"\.(\d+)\.", name) for name in stream.keys()}  # noqa: SIM118
            tensors = {name: stream.get_tensor(name) for name, at in numbers.items() if not at or int(at[0]) < layers}
            save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def measure(model: Path, edits: int, layers: int, work: Path) -> dict[str, Any]:
    """One row; what is to be known of the model alone is measured before, as it does not grow with the edits."""
    base = cut(model, layers, work / f"model-{layers}")
    shards, memory = work / "shards", work / "memory"
    file = write_lines(work / "edits.jsonl", made_up_edits(edits))
    few = write_lines(work / "few.jsonl", made_up_edits(1))
    wise("edit", str(base), str(few), "-o", str(shards), "--force")
    edited = wise("edit", str(base), str(file), "-o", str(shards), "--force")
    merged = wise("merge", str(shards), "-o", str(memory), "--force")
    kept = (shards / "unrelated.safetensors").stat().st_size / 1e6
    row = {"edits": edits, "layers": layers, "layer": edited["layer"], "untaken": len(edited["untaken"])}
    row |= {"edit_s": edited["seconds"], "merge_s": merged["seconds"], "peak_mb": edited["peak_rss_bytes"] / 1e6}
    return {**row, "shards_mb": _size(shards) - kept, "memory_mb": _size(memory)}


def _size(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.iterdir()) / 1e6


def slope(rows: list[dict[str, Any]], by: str, figure: str) -> float:
    """Slope of the least-squares line through the logarithms, in the upper half: fixed costs fade there."""
    upper = rows[len(rows) // 2 - 1 :]
    xs, ys = ([math.log(row[name]) for row in upper] for name in (by, figure))
    return linear_regression(xs, ys).slope


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a column each for edits and layers, a row each for time and bytes."""
    import matplotlib.pyplot as plt

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


def growth(options: Namespace) -> None:
    """How time, memory and files grow with the number of edits and with the depth of the model.

    Edits are made-up facts, so no data is needed. Models of fewer layers are the given one cut off above. Every row is
    a `wise edit` and a `wise merge` in processes of their own; rows that are there already are not measured again.
    Writes `growth.jsonl` and `growth.png`, and prints the slope of each figure against edits and layers on logarithmic
    scales: 1 is linear.
    """
    results = options.output / "growth.jsonl"
    require_same(options.output, {"model": options.model})
    depth = json.loads((options.model / "config.json").read_text())["num_hidden_layers"]
    by_edits = [(count, depth) for count in map(int, options.edits.split(","))]
    by_layers = [(options.at, layers) for layers in map(int, options.layers.split(","))]
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    known = {(row["edits"], row["layers"]) for row in rows}
    for edits, layers in dict.fromkeys([*by_edits, *by_layers]):
        if (edits, layers) not in known:
            print(f"{edits} edits, {layers} layers", flush=True)
            rows.append(measure(options.model, edits, layers, options.output))
            write_lines(results, rows)
    rows.sort(key=lambda row: (row["edits"], row["layers"]))
    named = [{FIGURES.get(name, name): value for name, value in row.items()} for row in rows]
    show([{name: row[name] for name in ("edits", "layers", *FIGURES.values())} for row in named], options, digits=1)
    groups = {
        "edits": [row for row in rows if (row["edits"], row["layers"]) in by_edits],
        "layers": [row for row in rows if (row["edits"], row["layers"]) in by_layers],
    }
    for by, group in groups.items():
        for name, text in FIGURES.items() if len(group) > 1 else ():
            print(f"{text}: {by}^{slope(group, by, name):.2f}")
    plot(groups, options.output / "growth.png")


def inference_options(parser: ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--edited", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a random prompt")
    parser.add_argument("--data", type=Path, help="edits in any known layout, whose rephrases are asked")
    parser.add_argument("--times", type=int, default=1, help="how many times each edit of a lookup counts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def growth_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--edits", default="10,30,100,300,1000")
    parser.add_argument("--layers", default="12,18,24,30")
    parser.add_argument("--at", type=int, default=100, help="edits while the layers grow")
    parser.add_argument("-o", "--output", type=Path, required=True)


MEASURES = {"inference": (inference, inference_options), "growth": (growth, growth_options)}

if __name__ == "__main__":
    run(__doc__, MEASURES)
