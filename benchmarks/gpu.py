"""Everything that a CUDA device can change, in one run of a few minutes: answers, seconds, memory.

    python benchmarks/gpu.py --model model --data edits.jsonl --work /tmp/gpu
    python benchmarks/gpu.py --model model --data edits.jsonl --work /tmp/gpu --device cpu --edits 6 --shape tiny

It edits, merges and exports the first records of a file on the device in float32 and bfloat16, and fewer of them on
the CPU; asks every prompt, rephrase and unrelated prompt on both; times a pass and a token beside the base's; edits a
large random model; and serves the export with vLLM if it is installed. A step that fails, or that no time is left for,
says so in its place, and the others go on. Prints a table, and writes ``gpu.json`` in the work directory.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cost
import large_model
import runner
import torch
import transformers
from multiplied import several
from runner import Row, ferries, show, wise, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.answers import answered

Figures = dict[str, Any]
_TOKENS = 24  # of an answer
_ROWS = 64  # of a batch of prompts


class Run:
    """The steps' common settings, what they measured, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.edits = read_edits(options.data)[: options.edits]
        self.ends_at = time.monotonic() + options.seconds
        self.figures: dict[str, Figures] = {}
        # What edits on the device answer, by the prompt.
        self.said: dict[str, str] = {}

    def step(self, name: str, needs: float, measure: Callable[[], Figures]) -> None:
        """Measure one thing, if so many seconds are left; what goes wrong becomes its figure."""
        if time.monotonic() + needs > self.ends_at:
            self.figures[name] = {"skipped": f"fewer than {needs:.0f} seconds were left"}
        else:
            begun = time.monotonic()
            try:
                self.figures[name] = measure()
            except (Exception, SystemExit) as error:  # one step's failure is a figure, and must not cost the others
                self.figures[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            self.figures[name]["step, s"] = round(time.monotonic() - begun, 1)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        print(name, json.dumps(self.figures[name]), file=sys.stderr, flush=True)
        (self.work / "gpu.json").write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")

    def directory(self, device: str, dtype: str) -> Path:
        """Where what was edited on a device in a type is exported."""
        return self.work / f"edited-{device.partition(':')[0]}-{dtype}"


def about(run: Run) -> Figures:
    """The machine and its libraries."""
    cuda = run.options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads of the CPU": torch.get_num_threads(),
    }


def edit(run: Run, device: str, dtype: str, count: int) -> Figures:
    """Edit, merge and export records in processes of their own, as a shell script would."""
    records, output = run.work / f"records-{count}.jsonl", run.directory(device, dtype)
    write_lines(records, [one.as_dict() for one in run.edits[:count]])
    shards, memory = (run.work / f"{name}-{output.name}" for name in ("shards", "memory"))
    where = ("--device", device, "--dtype", dtype)
    done = wise("edit", str(run.options.model), str(records), "-o", str(shards), *where, "--force")
    begun = time.monotonic()
    wise("merge", str(shards), "-o", str(memory), "--force")
    seconds = time.monotonic() - begun
    wise("export", str(run.options.model), "--memory", str(memory), "-o", str(output), "--force")
    gigabytes = {name: round(done.get(f"peak_{name}_bytes", 0) / 2**30, 2) for name in ("rss", "vram")}
    return {
        "edits": done["edits"],
        "untaken": len(done["untaken"]),
        "edit, s": round(done["seconds"], 1),
        "an edit, s": round(done["seconds_per_edit"], 3),
        "merge, s": round(seconds, 1),
        "peak memory, GiB": gigabytes["rss"],
        "peak memory of the device, GiB": gigabytes["vram"],
    }


def questions(edits: list[Edit]) -> dict[str, list[tuple[str, str]]]:
    """By sort the prompts, and of each the target that is right, or none."""
    return {
        "as taught": [(one.prompt, one.target) for one in edits],
        "rephrased": [(text, one.target) for one in edits for text in one.rephrases],
        "unrelated": [(prompt.prompt, "") for one in edits for prompt in one.locality],
    }


def say(path: Path, device: str, dtype: str, texts: list[str]) -> list[str]:
    """Greedy answers of a checkpoint that is loaded as its users load it."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype).eval().to(device)
    said = []
    for first in range(0, len(texts), _ROWS):
        said += answered(model, tokenizer, texts[first : first + _ROWS], max_new_tokens=_TOKENS)
    return [one.text for one in said]


def answers(run: Run, count: int) -> Figures:
    """What a checkpoint that was edited on the device answers there and on the CPU, by the sort of question."""
    device, path = run.options.device, run.directory(run.options.device, "float32")
    asked = questions(run.edits[:count])
    texts = [text for some in asked.values() for text, _ in some]
    said = {
        "base": say(run.options.model, device, "float32", texts),
        "float32": say(path, device, "float32", texts),
        "bfloat16": say(path, device, "bfloat16", texts),
        "float32 on the CPU": say(path, "cpu", "float32", texts),
    }
    run.said = dict(zip(texts, said["float32"], strict=True))
    figures: Figures = {"prompts": len(texts)}
    for name, own in said.items():
        first = 0
        for sort, some in asked.items():
            rows = range(first, first := first + len(some))
            if sort != "unrelated":
                figures[f"{name}: {sort}, right"] = share([own[row].startswith(some[row - rows[0]][1]) for row in rows])
            elif name == "float32":
                figures[f"{name}: {sort}, as the base"] = share([own[row] == said["base"][row] for row in rows])
    same = [one == other for one, other in zip(said["float32"], said["float32 on the CPU"], strict=True)]
    return {**figures, "answers on the device as on the CPU": share(same)}


def edit_on_cpu(run: Run) -> Figures:
    """A few edits made on the CPU, and whether they are answered as the same ones made on the device."""
    count = run.options.cpu_edits
    figures = edit(run, "cpu", "float32", count)
    texts = [text for some in questions(run.edits[:count]).values() for text, _ in some]
    said = say(run.directory("cpu", "float32"), run.options.device, "float32", texts)
    same = [run.said.get(text) == one for text, one in zip(texts, said, strict=True)]
    return {**figures, "answers as of edits on the device": share(same)}


def share(held: list[bool]) -> float:
    """Of all that are looked at, those for which something holds."""
    return round(sum(held) / max(len(held), 1), 4)


def costs(run: Run, times: int) -> Figures:
    """A pass over prompts of 128 tokens and a decoded token, beside the base's; edits counted so many times."""
    base, edited = run.options.model, several(run.directory(run.options.device, "float32"), times)
    models = {
        str(path): AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="bfloat16")
        .eval()
        .to(run.options.device)
        for path in (base, edited)
    }
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (4, 128), generator=drawn).to(run.options.device)
    rows = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        taken = cost.timed(models, rows, rounds=9)
    ratios = {way: cost.ratio(taken, way, str(edited), str(base)) for way in cost.WAYS}
    return {
        "edits": len(run.edits) * times,
        **{f"{way}, × base": round(one, 3) for way, one in ratios.items()},
        **{f"{way} of the base, ms": round(cost.milliseconds(taken, way, str(base)), 2) for way in ratios},
    }


def large(run: Run) -> Figures:
    """Edits of a random model of a shape: seconds an edit and memory."""
    shape = run.options.shape
    base, count = run.work / f"base-{shape}", run.options.large_edits
    begun = time.monotonic()
    if not base.is_dir():
        large_model.make_base(base, shape, run.options.model, hollow=False, device=run.options.device)
    written = time.monotonic() - begun
    write_lines(run.work / "large.jsonl", ferries(count))
    shards = run.work / f"shards-{shape}"
    where = ("-o", str(shards), "--device", run.options.device, "--force")
    done = wise("edit", str(base), str(run.work / "large.jsonl"), *where)
    return {
        "shape": shape,
        "checkpoint written, s": round(written, 1),
        "edits": done["edits"],
        "untaken": len(done["untaken"]),
        "edit, s": round(done["seconds"], 1),
        "an edit, s": round(done["seconds_per_edit"], 3),
        "peak memory of the device, GiB": round(done.get("peak_vram_bytes", 0) / 2**30, 1),
        "peak memory, GiB": round(done["peak_rss_bytes"] / 2**30, 1),
    }


def largest_batch(run: Run) -> Figures:
    """The most rows of 128 tokens that the edited large model decides and answers at once, by doubling."""
    base, memory, edited = (run.work / f"{name}-{run.options.shape}" for name in ("base", "memory", "edited"))
    shards = run.work / f"shards-{run.options.shape}"
    wise("merge", str(shards), "-o", str(memory), "--force")
    wise("export", str(base), "--memory", str(memory), "-o", str(edited), "--link", "--force")
    model = AutoModelForCausalLM.from_pretrained(
        edited, trust_remote_code=True, dtype="bfloat16", device_map=run.options.device
    ).eval()
    rows, seconds = 0, 0.0
    for tried in (2**power for power in range(run.options.most_rows.bit_length())):
        ids = torch.randint(1000, 20000, (tried, 128), device=run.options.device)
        begun = time.monotonic()
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        except torch.OutOfMemoryError:
            break
        rows, seconds = tried, time.monotonic() - begun
    return {"rows of 128 tokens": rows, "eight tokens for each, s": round(seconds, 2)}


def serving(run: Run) -> Figures:
    """Tokens a second of vLLM with the edits, beside the base's, by the script that measures just that."""
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    edited = run.directory(run.options.device, "float32")
    script = Path(__file__).with_name("serving.py")
    command = [sys.executable, str(script), str(run.options.model), str(edited), "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"table": done.stdout} if done.returncode == 0 else {"failed": done.stderr[-2000:]}


def gpu(options: argparse.Namespace) -> None:
    """Run the steps in order and print what they measured."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.cpu_edits = min(options.cpu_edits, options.edits)
    run, device = Run(options), options.device
    run.step("machine", 1, lambda: about(run))
    run.step("learned once a model, and one edit", 60, lambda: edit(run, device, "float32", 1))
    run.step("edit, float32", 30, lambda: edit(run, device, "float32", options.edits))
    run.step("answers", 40, lambda: answers(run, options.edits))
    run.step("costs", 15, lambda: costs(run, 1))
    run.step("costs of ten times the edits", 15, lambda: costs(run, 10))
    run.step("large model", 100, lambda: large(run))
    run.step("largest batch", 40, lambda: largest_batch(run))
    run.step("edit, bfloat16", 60, lambda: edit(run, device, "bfloat16", options.edits))
    run.step("edit on the CPU", 60, lambda: edit_on_cpu(run))
    run.step("serving", 120, lambda: serving(run))
    rows: list[Row] = []
    for name, own in run.figures.items():
        rows += [{"step": name, "figure": figure, "value": str(value)} for figure, value in own.items()]
    show(rows, options, width=120)


def gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the base, SmolLM2-135M-Instruct for example")
    parser.add_argument("--data", type=Path, required=True, help="edits in any known layout")
    parser.add_argument("--work", type=Path, required=True, help="a directory for all that is written")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--cpu-edits", type=int, default=12, help="how many of them are edited on the CPU too")
    parser.add_argument("--shape", choices=sorted(large_model.SHAPES), default="7b", help="of the random model")
    parser.add_argument("--large-edits", type=int, default=100, help="of the random model")
    parser.add_argument("--most-rows", type=int, default=4096, help="no larger batch is tried")
    parser.add_argument("--seconds", type=float, default=460, help="no step begins that would end later")


if __name__ == "__main__":
    runner.run(__doc__, {"gpu": (gpu, gpu_options)})
