"""Which questions open a memory: rephrases, an edit's prompt about somebody else, other records, other relations.

    python benchmarks/subjects.py memory zsre_mend_edit.json --model model

Counted at the prompt's end alone, where the first token of an answer is decided.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from wisecli.config import LoadOptions
from wisecli.data.corpus import rewordings, worded
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.activations import capture
from wisecli.models.tokenization import Row, collate, in_batches
from wisecli.routing.prompts import UNROUTED

_MOST = 200


@torch.no_grad()
def share(edited: EditedModel, prompts: list[str]) -> float:
    """How many of the prompts open an edit."""
    rows = [Row(tuple(edited.tokenizer(prompt)["input_ids"]), ()) for prompt in prompts]
    count = 0
    with edited.unedited():
        for indices in in_batches(rows, 32):
            batch = collate([rows[index] for index in indices]).to(edited.model.device)
            keys = capture(edited.model, edited.manifest.site, batch, above=False).keys
            chosen = edited.choices(keys, batch).chosen[:, batch.start]
            count += int((chosen != UNROUTED).sum())
    return count / len(prompts)


def questions(edits: list[Edit], records: list[Edit], chance: random.Random) -> dict[str, list[str]]:
    """Groups of prompts, by what they are; ``records`` are about other subjects."""
    subjects = [record.subject for record in records if record.subject]
    about = [(edit.prompt, edit.subject) for edit in edits if edit.subject and edit.subject in edit.prompt]
    relations = rewordings()
    return {
        "rephrases": [text for edit in edits for text in edit.rephrases[:1]],
        "edits' prompts about other subjects": [
            prompt.replace(subject, chance.choice(subjects)) for prompt, subject in about
        ],
        "other records": [record.prompt for record in chance.sample(records, min(_MOST, len(records)))],
        "made-up questions about edits' subjects": [
            worded(chance.choice(chance.choice(relations)), subject) for _, subject in about
        ],
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path)
    parser.add_argument("records", type=Path, help="a file with records about other subjects among them")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    edited = attach(arguments.memory, model=arguments.model, load=LoadOptions(device=arguments.device))
    edits = list(edited.manifest.edits)
    own = {edit.subject for edit in edits}
    records = [record for record in read_edits(arguments.records) if record.subject not in own]
    table = Table("prompts", "number", "open an edit")
    for name, prompts in questions(edits, records, random.Random(0)).items():
        table.add_row(name, str(len(prompts)), f"{share(edited, prompts):.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
