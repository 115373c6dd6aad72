"""What becomes of edits whose targets begin with a digit, as dates do: prompts and rephrases, bare and with a blank
behind them, answers counted.

    python benchmarks/dates.py --model model --data zsre_3k.json --first 400 --last 1400

An answer is right, that of another edit of the same subject (records may contradict each other), the unedited model's
own, or something else, which is the worst. Commands of the package write and merge; the answers are greedy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jsonlines

from wisecli.config import LoadOptions
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.running.generation import generate

_KINDS = ("right", "another edit's", "unedited", "other")
_LENGTH = 16


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", type=int, default=400)
    parser.add_argument("--last", type=int, default=1400)
    arguments = parser.parse_args()
    records = read_edits(arguments.data)[arguments.first : arguments.last]
    edits = [edit for edit in records if edit.target.strip()[:1].isdigit() and edit.rephrases]
    with tempfile.TemporaryDirectory() as place:
        edited = _written(arguments.model, edits, Path(place))
        kept = list(edited.manifest.edits)
        print(f"{len(kept)} edits".ljust(20), *(kind.rjust(16) for kind in _KINDS))
        asked = {"as taught": [edit.prompt for edit in kept], "rephrased": [edit.rephrases[0] for edit in kept]}
        asked |= {f"{name} + space": [f"{prompt} " for prompt in prompts] for name, prompts in asked.items()}
        for name, prompts in asked.items():
            counts = Counter(_kinds(edited, kept, prompts))
            print(name.ljust(20), *(str(counts[kind]).rjust(16) for kind in _KINDS))


def _written(model: Path, edits: Sequence[Edit], place: Path) -> EditedModel:
    """The edited model; of records that contradict each other the latest counts."""
    with jsonlines.open(place / "edits.jsonl", "w") as writer:
        writer.write_all(edit.as_dict() for edit in edits)
    shards, memory = str(place / "shards"), str(place / "memory")
    wise = [sys.executable, "-m", "wisecli"]
    latest = ["--on-conflict", "latest"]
    subprocess.run([*wise, "edit", str(model), str(place / "edits.jsonl"), "-o", shards, *latest], check=True)
    subprocess.run([*wise, "merge", shards, "-o", memory], check=True)
    return attach(Path(memory), model=str(model), load=LoadOptions())


def _kinds(edited: EditedModel, edits: Sequence[Edit], prompts: Sequence[str]) -> list[str]:
    after = _answers(edited, prompts)
    with edited.unedited():
        before = _answers(edited, prompts)
    found = []
    for edit, answer, own in zip(edits, after, before, strict=True):
        others = {other.target.strip() for other in edits if other.subject == edit.subject}
        if answer == edit.target.strip():
            found.append("right")
        elif answer in others:
            found.append("another edit's")
        else:
            found.append("unedited" if answer == own else "other")
    return found


def _answers(edited: EditedModel, prompts: Sequence[str]) -> list[str]:
    tokens = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=_LENGTH)
    return [text.strip() for text in edited.tokenizer.batch_decode(tokens)]


if __name__ == "__main__":
    main()
