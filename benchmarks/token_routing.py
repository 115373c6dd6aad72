"""What a memory with token routing opens at prompts' ends, form by form: the router alone, no answer is generated.

    wise merge shards -o token --routing token
    python benchmarks/token_routing.py token --every 4

"Own" is the share of prompts whose last token opens their edit, "other" of those that open another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from wisecli.config import LoadOptions
from wisecli.editing.key_capture import prompt_ends
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import attach
from wisecli.models.forms import usable_forms
from wisecli.models.loading import Loaded
from wisecli.progress import ignore

KINDS = ("as taught", "rephrased", "unrelated")


def prompts(edit: Edit) -> Iterator[tuple[str, str]]:
    """What is asked of an edit, by kind."""
    asked = ([edit.prompt], edit.rephrases[:1], [probe.prompt for probe in edit.locality[:1]])
    yield from ((kind, text) for kind, texts in zip(KINDS, asked, strict=True) for text in texts)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path)
    parser.add_argument("--every", type=int, default=1, help="ask every n-th edit")
    arguments = parser.parse_args()
    edited = attach(arguments.memory, load=LoadOptions(device="cpu"))
    loaded, numbered = Loaded(edited.model, edited.tokenizer), list(enumerate(edited.manifest.edits))
    forms = usable_forms(edited.tokenizer)
    asked = [
        (form.name, kind, place, form.asked(edited.tokenizer, text))
        for form in forms
        for place, edit in numbered[:: arguments.every]
        for kind, text in prompts(edit)
    ]
    with edited.unedited():
        (keys,) = prompt_ends(loaded, [edited.manifest.site], [text for *_, text in asked], batch_size=32, watch=ignore)
    strength, nearest = edited.routed.nearest(keys)
    found = edited.routed.memory_at(torch.where(strength > 1, nearest, -1)).tolist()
    table = Table("form (* never trained)", *(f"{kind}: {who}" for kind in KINDS for who in ("own", "other")))
    for form in forms:
        cells = []
        for kind in KINDS:
            some = [
                (opened, place)
                for (name, asks, place, _), opened in zip(asked, found, strict=True)
                if (name, asks) == (form.name, kind)
            ]
            own = sum(opened == place for opened, place in some)
            other = sum(opened not in (-1, place) for opened, place in some)
            cells += [f"{one / max(1, len(some)):.2f}" for one in (own, other)]
        table.add_row(form.name + ("" if form.trained else " *"), *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
