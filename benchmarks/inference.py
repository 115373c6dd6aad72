"""What the routed layer costs at inference: base and edited checkpoints take turns in one process.

    python benchmarks/inference.py --base model --edited edited --edited edited-matrix

Every round times each model once, in turn; the table has the median of the rounds' ratios to the base.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One pass over whole prompts."""
    model(ids, use_cache=False)


class Decode:
    """One more token a row after short prompts that are in the cache; takes it out again."""

    def __init__(self) -> None:
        self.caches: dict[PreTrainedModel, Cache] = {}

    def __call__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        """One step."""
        if model not in self.caches:
            self.caches[model] = model(ids[:, :16], use_cache=True).past_key_values
        model(ids[:, 16:17], past_key_values=self.caches[model], use_cache=True)
        self.caches[model].crop(-1)


# How each way runs, and how often a round.
WAYS: dict[str, tuple[Callable[[PreTrainedModel, torch.Tensor], None], int]] = {
    "prefill": (prefill, 1),
    "decode": (Decode(), 10),
}


def seconds(way: Callable[[PreTrainedModel, torch.Tensor], None], model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds of one run, the device's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    way(model, ids)
    synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--edited", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    models = {
        str(path): AutoModelForCausalLM.from_pretrained(path, trust_remote_code=path != arguments.base)
        .eval()
        .to(arguments.device)
        for path in (arguments.base, *arguments.edited)
    }
    vocabulary = models[str(arguments.base)].config.vocab_size
    ids = torch.randint(vocabulary, (arguments.batch, arguments.tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(arguments.device)
    table = Table(title=f"{arguments.batch} rows, {arguments.device}")
    for name in ("model", *(f"{way}, ms" for way in WAYS), *(f"{way}, × base" for way in WAYS)):
        table.add_column(name, justify="left" if name == "model" else "right")
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.rounds + 1):  # the first round only warms up
        for way, (run, times) in WAYS.items():
            for _ in range(times):
                for name, model in models.items():
                    spent = seconds(run, model, ids)
                    if turn:
                        taken.setdefault((way, name), []).append(spent)
    for name in models:
        own = [median(taken[way, name]) * 1e3 for way in WAYS]
        pairs = [zip(taken[way, name], taken[way, str(arguments.base)], strict=True) for way in WAYS]
        ratios = [median(mine / base for mine, base in pair) for pair in pairs]
        table.add_row(name, *(f"{one:.1f}" for one in own), *(f"{ratio:.3f}" for ratio in ratios))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
