"""Made-up facts in English, German, French and Chinese: taught in English alone, and in all four languages.

    python benchmarks/languages.py --model model --work languages

The facts are in languages.jsonl beside this file. What is measured is whether the target's tokens are the most likely
ones, asked in each language for that language's target; ``locality`` is of unrelated questions in the other three.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, MergeSettings
from wisecli.edits.record import Edit, read_edits

FACTS = Path(__file__).with_suffix(".jsonl")


def measure(model: Path, records: list[Edit], work: Path) -> dict[str, float]:
    """Teach records, and ask for the facts in all languages."""
    work.mkdir(parents=True, exist_ok=True)
    edits = work / "edits.jsonl"
    edits.write_text("".join(json.dumps(record.as_dict()) + "\n" for record in records), encoding="utf-8")
    written = edit(str(model), edits, work / "shards", EditSettings(), options=RunOptions(force=True))
    merge([work / "shards"], work / "memory", MergeSettings(), force=True)
    report = evaluate(work / "memory", EvalSettings(generate=False), data=FACTS)
    return {
        **report.after,
        "s an edit": written.seconds_per_edit,
        **{f"before {n}": v for n, v in report.before.items()},
    }


def main() -> None:
    """Measure both ways of teaching."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("languages"))
    arguments = parser.parse_args()
    facts = read_edits(FACTS)
    taught = {"English": [replace(fact, translations=()) for fact in facts], "all four": facts}
    found = {name: measure(arguments.model, records, arguments.work / name) for name, records in taught.items()}
    names = ["reliability", *(name for name in found["English"] if name.startswith("generalization_")), "locality"]
    table = Table(title=f"{len(facts)} facts")
    for column in ("taught in", *names, "s an edit"):
        table.add_column(column.replace("generalization_", "in "), justify="left" if column == "taught in" else "right")
    table.add_row("nothing", *(f"{found['English'][f'before {name}']:.3f}" for name in names), "")
    for name, figures in found.items():
        table.add_row(name, *(f"{figures[column]:.3f}" for column in (*names, "s an edit")))
    Console(soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    main()
