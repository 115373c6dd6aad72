"""Quality of every way to store edits, over numbers of edits: one table, resumable.

    python benchmarks/quality.py --model model --data zsre_mend_edit.json --edits 10,100 -o results.jsonl

Each line of the results file is one way at one number of edits; what is there is not measured again, so that an
interrupted run goes on where it stopped. Shards are kept beside the file and shared by ways that read the same ones.
Seconds an edit are those of the whole `wise edit` and `wise merge`, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
from commands import require_same, wise
from rich.console import Console
from rich.table import Table

from wisecli.edits.record import read_edits


@dataclass(frozen=True)
class Way:
    """A way to store edits: the shards it reads, and the flags of both commands."""

    shards: str
    edit: tuple[str, ...]
    merge: tuple[str, ...]


_MATRIX, _MERGED = (
    (
        "--set",
        "in_forms=false",
    ),
    ("--mode", "merge"),
)
_FIVE = (*_MATRIX, "--set", "shards=5")
_SPARSE = (*_FIVE, "--set", "mask_ratio=0.2")
_APART = (*_SPARSE, "--set", "masks=disjoint")
_GRADIENT = ("--set", "writer=gradient")
WAYS: dict[str, Way] = {
    "lookup": Way("solve", (), ()),
    "lookup, any subject": Way("solve", (), ("--set", "subjects=any")),
    "solve + TIES + refit": Way("matrix", _MATRIX, _MERGED),
    "solve + TIES": Way("matrix", _MATRIX, (*_MERGED, "--set", "refit=false")),
    "solve + exact": Way("matrix", _MATRIX, (*_MERGED, "--method", "exact")),
    "solve + retrieve": Way("matrix", _MATRIX, ("--mode", "retrieve")),
    "solve ρ=1 + TIES + refit": Way("whole", (*_MATRIX, "--set", "mask_ratio=1"), _MERGED),
    "solve ρ=1 + exact": Way("whole", (*_MATRIX, "--set", "mask_ratio=1"), (*_MERGED, "--method", "exact")),
    "5 shards, TIES": Way("five", _FIVE, (*_MERGED, "--set", "refit=false")),
    "5 shards, TIES + refit": Way("five", _FIVE, _MERGED),
    "5 shards, exact": Way("five", _FIVE, (*_MERGED, "--method", "exact")),
    "5 shards, retrieve": Way("five", _FIVE, ("--mode", "retrieve")),
    "5 shards ρ=.2, TIES": Way("sparse", _SPARSE, (*_MERGED, "--set", "refit=false")),
    "5 shards ρ=.2, TIES + refit": Way("sparse", _SPARSE, _MERGED),
    "5 shards ρ=.2 disjoint, TIES": Way("apart", _APART, (*_MERGED, "--set", "refit=false")),
    "5 shards ρ=.2 disjoint, TIES + refit": Way("apart", _APART, _MERGED),
    "gradient batched": Way("gradient", _GRADIENT, (*_MERGED, "--set", "refit=false")),
    "paper preset": Way("paper", ("--preset", "paper"), ()),
}
FIGURES = ("reliability", "generalization", "locality", "portability", "routing", "generated_exact")


def measure(way: Way, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one way at one number of edits."""
    work = arguments.output.with_suffix("") / str(count)
    work.mkdir(parents=True, exist_ok=True)
    edits, shards, memory = work / "edits.jsonl", work / f"shards-{way.shards}", work / "memory"
    records = read_edits(arguments.data)[arguments.skip : arguments.skip + count]
    with jsonlines.open(edits, "w") as writer:
        writer.write_all(record.as_dict() for record in records)
    kept = work / f"report-{way.shards}.json"
    if not kept.is_file():
        report = wise("edit", str(arguments.model), str(edits), "-o", str(shards), "--force", *way.edit)
        kept.write_text(json.dumps(report), encoding="utf-8")
    written = json.loads(kept.read_text(encoding="utf-8"))
    merged = wise("merge", str(shards), "-o", str(memory), "--force", *way.merge)
    flags = ("--forms", "none", "--kinds", "none") if arguments.generate else ("--no-generate",)
    results = wise("eval", "--memory", str(memory), "--dataset", str(edits), *flags)
    figures = next(iter(results.values()))
    return {
        **{name: figures[name] for name in FIGURES if name in figures},
        "perplexity_median": figures.get("perplexity_median"),
        "before": {name: figures["before"].get(name) for name in FIGURES},
        "shards": written["shards"],
        "seconds_per_edit": (written["seconds"] + merged["seconds"]) / count,
        "peak_rss_bytes": max(written["peak_rss_bytes"], merged["peak_rss_bytes"]),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """All results, a row each."""
    shown = Table()
    for name in ("edits", "way", *FIGURES, "s an edit", "peak MB"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        figures = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in FIGURES]
        cost = f"{row['seconds_per_edit']:.2f}", f"{row['peak_rss_bytes'] / 1e6:.0f}"
        shown.add_row(str(row["edits"]), row["way"], *figures, *cost)
    return shown


def main() -> None:
    """Measure what is missing, then print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--edits", default="10,100,500", help="numbers of edits, comma-separated")
    parser.add_argument("--ways", help=f"some of: {'; '.join(WAYS)} (semicolons between; all by default)")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many records")
    parser.add_argument("--no-generate", dest="generate", action="store_false", help="no generated answers")
    parser.add_argument("-o", "--output", type=Path, default=Path("quality.jsonl"))
    arguments = parser.parse_args()
    require_same(
        arguments.output.with_suffix(""),
        {name: getattr(arguments, name) for name in ("model", "data", "skip", "generate")},
    )
    ways = [name.strip() for name in arguments.ways.split(";")] if arguments.ways else list(WAYS)
    rows: list[dict[str, Any]] = []
    if arguments.output.is_file():
        with jsonlines.open(arguments.output) as reader:
            rows = list(reader)
    known = {(row["edits"], row["way"]) for row in rows}
    for count in map(int, arguments.edits.split(",")):
        for name in ways:
            if (count, name) in known:
                continue
            print(f"{count} edits, {name}", file=sys.stderr, flush=True)
            row = {"edits": count, "way": name, **measure(WAYS[name], count, arguments)}
            rows.append(row)
            with jsonlines.open(arguments.output, "a") as writer:
                writer.write(row)
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
