"""What an edited model says to questions that follow from its edits, by their kind.

    python benchmarks/consequences.py --data ZsRE-test.json --edits 40 --skip 100 --model model

Everything is generated, greedily, and compared in full: an answer is right if it is the target and then ends. The same
records are edited as they are, with what follows from them by rule (`--derive`), and with the very questions stated as
`also`, which says how much of all that an edit of its own holds. Beside them stand the edits themselves, and questions
that should keep the base model's answer word for word.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, LoadOptions, MergeSettings
from wisecli.edits.checks.admission import Admission
from wisecli.edits.record import Edit, parse_edit
from wisecli.edits.text import unmarked
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.running.generation import generate

_LENGTH = 24
KINDS = ("Subject_Aliasing", "Reasoning", "Logical_Generalization")


def answers(edited: EditedModel, prompts: Sequence[str]) -> list[str]:
    """What the model says, up to its end or to so many tokens."""
    said = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=_LENGTH, batch_size=32)
    return [text.strip() for text in edited.tokenizer.batch_decode(said, skip_special_tokens=True)]


def right(said: Sequence[str], targets: Sequence[str]) -> float:
    """Share of answers that are the target, and nothing more."""
    return sum(unmarked(one) == unmarked(target) for one, target in zip(said, targets, strict=True)) / max(len(said), 1)


@dataclass(frozen=True)
class Asked:
    """Records, and by its kind what follows from them: prompts with answers."""

    records: Sequence[Mapping[str, Any]]
    edits: Sequence[Edit]
    follows: Mapping[str, Sequence[tuple[str, str]]]


def asked_of(records: Sequence[Mapping[str, Any]]) -> Asked:
    """What is asked of KnowEdit's records."""
    own = [following(record) for record in records]
    follows = {kind: [pair for one in own for pair in one.get(kind, [])] for kind in KINDS}
    return Asked(records, [parse_edit(record) for record in records], follows)


def following(record: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """What follows from a record, by its kind."""
    found = {}
    for kind, prompts in (record.get("portability") or {}).items():
        pairs = parse_edit({**record, "portability": {kind: prompts}}).portability
        found[kind] = [(pair.prompt, pair.answer) for pair in pairs]
    return found


def beside(asked: Asked) -> list[str]:
    """Questions that should keep the base model's answer, one a record."""
    return [probe.prompt for one in asked.edits for probe in one.locality[:1]]


def figures(edited: EditedModel, asked: Asked, before: Sequence[str]) -> dict[str, float]:
    """Shares of right answers, and of answers beside the edits that are those ``before``."""
    every = [pair for pairs in asked.follows.values() for pair in pairs]
    prompts = [*(one.prompt for one in asked.edits), *(prompt for prompt, _ in every), *beside(asked)]
    said = iter(answers(edited, prompts))
    found = {"edits": right([next(said) for _ in asked.edits], [one.target for one in asked.edits])}
    for kind, pairs in asked.follows.items():
        found[kind] = right([next(said) for _ in pairs], [answer for _, answer in pairs])
    found["all that follows"] = sum(found[kind] * len(pairs) for kind, pairs in asked.follows.items()) / len(every)
    found["unrelated unchanged"] = sum(map(str.__eq__, before, said)) / max(len(before), 1)
    return found


def stated(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what follows from it stated."""
    pairs = [pair for own in following(record).values() for pair in own]
    return {**record, "also": [{"prompt": prompt, "target": answer} for prompt, answer in pairs]}


def edited_by(records: Sequence[Mapping[str, Any]], place: Path, options: argparse.Namespace, *, derive: bool) -> Path:
    """A memory of the records."""
    place.mkdir()
    file = place / "edits.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings, load = EditSettings(), LoadOptions(device=options.device)
    admission = Admission(on_conflict="keep", derive=derive)
    edit(options.model, file, place / "shards", settings, load=load, admission=admission)
    merge([place / "shards"], place / "memory", MergeSettings())
    return place / "memory"


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="records that are passed over")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = json.loads(options.data.read_text(encoding="utf-8"))[options.skip : options.skip + options.edits]
    asked = asked_of(records)
    counts = {kind: len(pairs) for kind, pairs in asked.follows.items()}
    rows: dict[str, dict[str, float]] = {}
    before: list[str] = []
    with tempfile.TemporaryDirectory() as working:
        arms = {"edits alone": (records, False), "--derive": (records, True)}
        arms["also stated"] = ([stated(record) for record in records], False)
        for name, (some, derive) in arms.items():
            started = time.perf_counter()
            memory = edited_by(some, Path(working) / name.strip("-").replace(" ", "-"), options, derive=derive)
            seconds = time.perf_counter() - started
            edited = attach(memory, model=options.model, load=LoadOptions(device=options.device))
            if not rows:
                with edited.unedited():
                    before = answers(edited, beside(asked))
                    rows["unedited"] = figures(edited, asked, before)
            follow = len(edited.manifest.edits) - len(records)
            rows[name] = {**figures(edited, asked, before), "consequences": follow, "seconds": seconds}
            print(name, json.dumps(rows[name]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps({"rows": rows, "questions": counts}, indent=1))
    table = Table("", *(f"{name} ({counts[name]})" if name in counts else name for name in rows["unedited"]))
    for name, own in rows.items():
        table.add_row(name, *(f"{own[figure]:.2f}" for figure in rows["unedited"]))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
