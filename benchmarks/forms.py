"""What an edited model says to its edits in every form that they are asked in, and to what it should not answer.

    python benchmarks/forms.py memory zsre_3k.json --asked 40

Everything is generated, greedily, and compared in full: an answer is right if it is the target and then ends. Forms
with a star were never used in training. Beside the answers stand prompts that should keep the base model's answer
word for word, and questions that should not get an edit's target.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from finding import about
from rich.console import Console
from rich.table import Table

from wisecli.config import LoadOptions
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.forms import Form, usable_forms
from wisecli.models.generation import generate

_LENGTH = 24


def answers(edited: EditedModel, prompts: Sequence[str], *, length: int = _LENGTH) -> list[str]:
    """What the model says, up to its end or to so many tokens."""
    said = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=length, batch_size=32)
    return [text.strip() for text in edited.tokenizer.batch_decode(said, skip_special_tokens=True)]


def plain(text: str) -> str:
    """A text without case, and without what stands around it."""
    return text.casefold().strip(" .\n\t\"'")


def right(said: Sequence[str], targets: Sequence[str]) -> float:
    """Share of answers that are the target, and nothing more."""
    return sum(plain(one) == plain(target) for one, target in zip(said, targets, strict=True)) / max(len(said), 1)


def row(edited: EditedModel, form: Form, asked: Sequence[Edit]) -> dict[str, float]:
    """The figures of one form."""

    def written(prompts: Sequence[str]) -> list[str]:
        return [form.asked(edited.tokenizer, prompt) for prompt in prompts]

    targets = [edit.target for edit in asked]
    found = {"as taught": right(answers(edited, written([edit.prompt for edit in asked])), targets)}
    reworded = [edit for edit in asked if edit.rephrases]
    said = answers(edited, written([edit.rephrases[0] for edit in reworded]))
    found["rephrased"] = right(said, [edit.target for edit in reworded])
    unrelated = written([probe.prompt for edit in asked for probe in edit.locality[:1]])
    after = answers(edited, unrelated)
    with edited.unedited():
        before = answers(edited, unrelated)
    same = sum(one == other for one, other in zip(before, after, strict=True))
    return {**found, "unrelated unchanged": same / max(len(unrelated), 1)}


def specificity(edited: EditedModel, edits: Sequence[Edit], records: Sequence[Edit]) -> dict[str, float]:
    """Share of questions beside the edits that get an edit's target."""
    chance = random.Random(1)
    known = [(place, edit) for place, edit in enumerate(edits) if edit.subject and edit.subject in edit.prompt]
    others = [edit.prompt.replace(str(edit.subject), str(chance.choice(records).subject)) for _, edit in known]
    found = {}
    for name, prompts in (("other question", about(known, chance)), ("other subject", others)):
        pairs = zip(answers(edited, prompts), known, strict=True)
        with edited.unedited():
            before = answers(edited, prompts)
        got = [
            plain(said) == plain(edit.target) != plain(was)
            for (said, (_, edit)), was in zip(pairs, before, strict=True)
        ]
        found[name] = sum(got) / max(len(got), 1)
    return found


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path)
    parser.add_argument(
        "records", type=Path, help="the file that the edits are from, with records about other subjects"
    )
    parser.add_argument("--model")
    parser.add_argument("--asked", type=int, default=40, help="edits that are asked")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    edited = attach(arguments.memory, model=arguments.model, load=LoadOptions(device=arguments.device))
    edits = list(edited.manifest.edits)
    asked = edits[:: max(1, len(edits) // arguments.asked)]
    own = {edit.subject for edit in edits}
    records = [record for record in read_edits(arguments.records) if record.subject and record.subject not in own]
    table = Table("form", "as taught", "rephrased", "unrelated unchanged")
    rows = {form: row(edited, form, asked) for form in usable_forms(edited.tokenizer)}
    for form, figures in rows.items():
        table.add_row(form.name + ("" if form.trained else " *"), *(f"{value:.2f}" for value in figures.values()))
    for trained in (True, False):
        some = [figures for form, figures in rows.items() if form.trained == trained]
        means = [sum(figures[name] for figures in some) / len(some) for name in some[0]]
        table.add_row(f"mean, {'trained' if trained else 'never trained'}", *(f"{mean:.3f}" for mean in means))
    console = Console(width=120)
    console.print(table)
    beside = specificity(edited, asked, records)
    for name, share in beside.items():
        console.print(f"{name}: {share:.3f} get the edit's target")
    if arguments.json is not None:
        content = {form.name: figures for form, figures in rows.items()} | {"specificity": beside}
        arguments.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
