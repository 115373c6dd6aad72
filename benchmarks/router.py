"""What finding the nearest key costs a token, and how it grows with the number of keys of a lookup.

    python benchmarks/router.py --d-ff 1536

Random keys, whitened by moments of the rank that real ones have; compared with all of them, as exported checkpoints do
and by the approximate index that evaluation uses above ten thousand (extra `index`). Medians; the index also says how
often it finds the same key, for tokens as near to their key as rephrases are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wisecli.routing.ann_index import build_index
from wisecli.routing.scores import SideMemory
from wisecli.routing.side_memory import RoutedMatrix

RANK, WHITENINGS, D = 256, 2, 8
REPEATS = 9


def lookup(keys: int, d_ff: int) -> RoutedMatrix:
    """A lookup of random keys, an edit each."""
    generator = torch.Generator().manual_seed(keys)
    metric = torch.arange(keys) % WHITENINGS
    probes = torch.randn(keys, d_ff, generator=generator)
    directions = torch.stack(
        [torch.linalg.qr(torch.randn(d_ff, RANK, generator=generator)).Q.T for _ in range(WHITENINGS)]
    )
    tensors = {
        "values": torch.zeros(1, D, dtype=torch.float16),
        "value": torch.zeros(keys, dtype=torch.long),
        "probes": (probes / probes.norm(dim=-1, keepdim=True)).half(),
        "owner": torch.arange(keys),
        "offset": torch.zeros(keys),
        "metric": metric,
        "directions": directions.half(),
        "gains": torch.zeros(WHITENINGS, RANK),
        "floors": torch.ones(WHITENINGS),
    }
    memory = SideMemory(tensors, (0.3,) * keys, "key", "token", "lookup", 0.0)
    return RoutedMatrix(nn.Linear(1, 1, bias=False), memory, transposed=False)


def seconds(run: Callable[[], object]) -> float:
    """Median time of a call, the first one left out."""
    run()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@torch.no_grad()
def measure(keys: int, d_ff: int, tokens: int) -> tuple[str, ...]:
    """One row of the table."""
    routed = lookup(keys, d_ff)
    near = torch.arange(tokens) * (keys // tokens)
    asked = routed.probes[near].float() + torch.randn(tokens, d_ff) * d_ff**-0.5

    def compare(some: Tensor) -> Tensor:
        return routed.nearest(some)[1]

    single, many = seconds(lambda: compare(asked[:1])), seconds(lambda: compare(asked)) / tokens
    row = [f"{keys:,}", f"{routed.probes.nbytes / 1e6:.0f}", f"{1e3 * single:.3f}", f"{1e3 * many:.3f}"]
    found = compare(asked)
    begun = time.perf_counter()
    index = build_index(routed)
    if index is None:
        return (*row, "", "", "")
    built = time.perf_counter() - begun
    alike = float((index(routed, asked)[1] == found).float().mean())
    return (*row, f"{1e3 * seconds(lambda: index(routed, asked[:1])):.3f}", f"{alike:.2f}", f"{built:.1f}")


def main() -> None:
    """Print a row for each number of keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="100,1000,10000,20000,50000,100000")
    parser.add_argument("--d-ff", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=64, help="tokens at a time, for the last but three columns")
    arguments = parser.parse_args()
    table = Table("keys", "MB", "ms, one token", f"ms, of {arguments.tokens}", "ms, indexed", "same key", "s to index")
    for keys in map(int, arguments.keys.split(",")):
        table.add_row(*measure(keys, arguments.d_ff, arguments.tokens))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
