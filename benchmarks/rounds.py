"""Edits that come in rounds, each into the same memory, against all of them at once.

    python benchmarks/rounds.py --model model --data zsre_mend_edit.json --rounds 10 --edits 20 -o rounds/

Every round is a `wise edit --into` in a process of its own; both memories are then measured by `wise eval`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import jsonlines
from commands import wise
from rich.console import Console
from rich.table import Table

from wisecli.edits.record import Edit, read_edits

FIGURES = ("reliability", "generalization", "locality", "routing", "generated_exact")


def into(model: Path, memory: Path, parts: list[list[Edit]]) -> float:
    """Edit a memory part after part; the seconds it took."""
    shutil.rmtree(memory, ignore_errors=True)
    begun = time.perf_counter()
    for part in parts:
        file = memory.parent / "edits.jsonl"
        with jsonlines.open(file, "w") as writer:
            writer.write_all(edit.as_dict() for edit in part)
        wise("edit", str(model), str(file), "--into", str(memory))
    return time.perf_counter() - begun


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--edits", type=int, default=20, help="a round")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    size, count = arguments.edits, arguments.rounds * arguments.edits
    edits = read_edits(arguments.data, limit=count)
    shown = Table("rounds", "edits each", *FIGURES, "s", "files MB")
    for parts in ([edits[at : at + size] for at in range(0, count, size)], [edits]):
        memory = arguments.output / f"memory-{len(parts)}"
        seconds = into(arguments.model, memory, parts)
        (figures,) = wise("eval", "--memory", str(memory), "--forms", "none", "--kinds", "none").values()
        megabytes = sum(path.stat().st_size for path in memory.rglob("*") if path.is_file()) / 1e6
        cells = (f"{figures[name]:.3f}" for name in FIGURES)
        shown.add_row(str(len(parts)), str(len(parts[0])), *cells, f"{seconds:.0f}", f"{megabytes:.0f}")
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
