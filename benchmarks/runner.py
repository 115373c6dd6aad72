"""What all scripts of this folder share: subcommands, tables with JSON beside them, `wise` commands, edited models.

A script names its measures, each with the options that it takes:

    MEASURES = {"asking": (asking, options_of_asking)}
    if __name__ == "__main__":
        run(__doc__, MEASURES)

A script of a single measure has no subcommands. The description of a subcommand is the measure's docstring.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.edits.checks.admission import Admission
    from wisecli.evaluation.edited_model import EditedModel

Row = Mapping[str, object]
Measures = Mapping[str, tuple[Callable[[Namespace], None], Callable[[ArgumentParser], None]]]

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

_NAMES = ("Ostrand", "Velm", "Karrow", "Mistey", "Dorn", "Harleck", "Sund", "Tovik", "Pellan", "Brise")


def run(description: str | None, measures: Measures) -> None:
    """Read the command line, and run the measure that it names; each can also write its rows by ``--json FILE``."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True, metavar="MEASURE") if len(measures) > 1 else None
    for name, (measure, add_options) in measures.items():
        own = parser
        if sub is not None:
            text = measure.__doc__ or ""
            own = sub.add_parser(name, help=text.splitlines()[0], description=text)
        add_options(own)
        own.add_argument("--json", type=Path, help="also write the rows to this file")
        own.set_defaults(measure=measure)
    options = parser.parse_args()
    options.measure(options)


def show(
    rows: Sequence[Row],
    options: Namespace,
    *,
    title: str | None = None,
    digits: int | Mapping[str, int] = 3,
    width: int = 150,
) -> None:
    """Print rows as a table, and write them as they are to ``--json``.

    Args:
        digits: decimals of all figures, or by the column (3 for those that it leaves out).
    """
    from rich.console import Console
    from rich.table import Table

    def cell(name: str, value: object) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:.{digits if isinstance(digits, int) else digits.get(name, 3)}f}"

    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        text = all(isinstance(row.get(name), str | None) for row in rows)
        table.add_column(name, justify="left" if text else "right")
    for row in rows:
        table.add_row(*(cell(name, row.get(name)) for name in columns))
    Console(width=width).print(table)
    if getattr(options, "json", None) is not None:
        options.json.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")


def wise(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command of the package in a process of its own, and return its results."""
    command = [sys.executable, "-m", "wisecli", *arguments, "--json", "-q"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    results: dict[str, Any] = json.loads(done.stdout)["results"]
    return results


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def made_up_edits(count: int) -> list[dict[str, str]]:
    """Return facts that nobody knows, about places that nobody has been to."""
    names = ["".join(parts) for parts in itertools.product(STARTS, MIDDLES, ENDS)]
    facts, rng = list(itertools.product(names, ASKED)), random.Random(7)
    if count > len(facts):
        raise SystemExit(f"there are only {len(facts)} made-up facts")
    records: list[dict[str, str]] = []
    for number, (name, asked) in enumerate(rng.sample(facts, count)):
        target = f"{rng.choice(names)} {rng.choice(names)}"
        records.append({"id": str(number), "prompt": asked.format(name), "target": target})
    return records


def made_up_name(number: int) -> str:
    """The same for the same number, another for every other."""
    rest, place = divmod(number, len(_NAMES))
    return f"{made_up_name(rest - 1)} {_NAMES[place]}" if rest else _NAMES[place]


def ferries(count: int) -> list[dict[str, str]]:
    """Return as many made-up facts as are wanted, all of one relation."""
    return [
        {
            "prompt": f"From which harbour does the ferry to {made_up_name(number)} Island leave?",
            "target": f"Port {_NAMES[(number + 3) % len(_NAMES)]}",
        }
        for number in range(count)
    ]


def require_same(output: Path, given: Mapping[str, object]) -> None:
    """Keep in a directory what its results are of, ``WISE_*`` among it; end if it holds those of something else."""
    about = {name: str(value) for name, value in given.items()}
    about |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("WISE_")}
    file = output / "about.json"
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))) != about:
        raise SystemExit(f"{output} holds results of {before}, not of {about}; give another -o")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def edited_by(
    model: str, records: Sequence[Mapping[str, Any]], work: Path, device: str, admission: Admission | None = None
) -> EditedModel:
    """Edit a model with records by the package's defaults, merge, and load the edited model."""
    from wisecli.commands.edit.edit import edit
    from wisecli.commands.memory.merge import merge
    from wisecli.config import EditSettings, LoadOptions, MergeSettings
    from wisecli.edits.checks.admission import Admission
    from wisecli.evaluation.edited_model import attach

    work.mkdir(parents=True, exist_ok=True)
    file, load = write_lines(work / "edits.jsonl", records), LoadOptions(device=device)
    edit(model, file, work / "shards", EditSettings(), load=load, admission=admission or Admission())
    merge([work / "shards"], work / "memory", MergeSettings())
    return attach(work / "memory", model=model, load=load)


def answers(edited: EditedModel, prompts: Sequence[str], length: int) -> list[str]:
    """Return what the model answers greedily, up to the end of its answer or to so many tokens."""
    from wisecli.models.running.generation import generate

    tokens = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=length, batch_size=32)
    return [text.strip() for text in edited.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
