"""What the routed layer costs at inference: base and edited checkpoints take turns in one process.

    python benchmarks/inference.py --base model --edited edited --edited edited-matrix
    python benchmarks/inference.py --base model --edited edited --data edits.jsonl [--chat] [--times 10]

Prompts are random tokens, or with --data the edits' first rephrases, so that many are answered by a memory. A pass over
whole prompts decides them as well. With --times a lookup counts so many times, as if it held so many more edits. Every
round times each model once, in turn; the table has the median of the rounds' ratios to the base.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from multiplied import several
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, Cache, PreTrainedModel

from wisecli.edits.record import read_edits
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.routing.passes.token_cache import cache_returned


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


def prompts(arguments: argparse.Namespace) -> BatchEncoding:
    """The rows that are asked, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.base, padding_side="left")
    if arguments.data is None:
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(len(tokenizer), (arguments.batch, arguments.tokens), generator=chance)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    edits = [edit for edit in read_edits(arguments.data) if edit.rephrases][: arguments.batch]
    asked = [edit.rephrases[0] for edit in edits]
    if arguments.chat:
        asked = [chat_prompt(tokenizer, one) for one in asked]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows: BatchEncoding = tokenizer(asked, return_tensors="pt", padding=True)
    return rows


def timed(models: dict[str, PreTrainedModel], rows: BatchEncoding, rounds: int) -> Times:
    """Seconds of every run, the models in turn; a first round, not counted, warms up."""
    taken: Times = {}
    for turn in range(rounds + 1):
        for way, (run, times) in WAYS.items():
            for _ in range(times):
                for name, model in models.items():
                    spent = seconds(run, model, rows)
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
def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--edited", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a random prompt")
    parser.add_argument("--data", type=Path, help="edits in any known layout, whose rephrases are asked")
    parser.add_argument("--chat", action="store_true", help="ask them in the chat template")
    parser.add_argument("--times", type=int, default=1, help="how many times each edit of a lookup counts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    edited = [several(path, arguments.times) for path in arguments.edited]
    models = {
        str(path): AutoModelForCausalLM.from_pretrained(path, trust_remote_code=path != arguments.base)
        .eval()
        .to(arguments.device)
        for path in (arguments.base, *edited)
    }
    rows = prompts(arguments).to(arguments.device)
    table = Table(title=f"{arguments.batch} rows of {rows['input_ids'].shape[1]} tokens, {arguments.device}")
    for name in ("model", *(f"{way}, ms" for way in WAYS), *(f"{way}, × base" for way in WAYS)):
        table.add_column(name, justify="left" if name == "model" else "right")
    taken = timed(models, rows, arguments.rounds)
    for name in models:
        times = (f"{milliseconds(taken, way, name):.1f}" for way in WAYS)
        table.add_row(name, *times, *(f"{ratio(taken, way, name, str(arguments.base)):.3f}" for way in WAYS))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
