"""Which prompts find the edit that they mean, form by form, without any residual: the router by itself.

    python benchmarks/finding.py MODEL zsre_3k.json --first 0 --edits 200 --asked 50

Rephrases of some of the edits are asked in every form. Beside them stand prompts that should find nothing: made-up
questions about an edit's subject, edits' own prompts about other subjects, other records, and unrelated prompts.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.config import LoadOptions
from wisecli.data.corpus import rewordings, worded
from wisecli.editing.router_training.projection_training import train_projections
from wisecli.editing.router_training.token_states import prompt_states, router_site, token_states
from wisecli.edits.record import Edit, read_edits
from wisecli.io.checkpoint import Checkpoint
from wisecli.memory.fitting.late_interaction_fitting import MIN_EDIT_PROB, fit_late_interaction, text_edit_probs
from wisecli.models.layout.site import Site, find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.progress import ignore_progress
from wisecli.routing.deciding.late_interaction import LateInteraction


class Finder:
    """The router of some edits."""

    def __init__(self, loaded: Loaded, site: Site, heads: RouterHeads, edits: list[Edit]) -> None:
        self.loaded, self.site = loaded, site
        numbered = list(enumerate(edits))
        states = prompt_states(loaded, site, numbered, batch_size=32, on_progress=ignore_progress, stage="")
        fitted = fit_late_interaction(heads, states, len(edits))
        self.late_interaction = LateInteraction(fitted.tensors, len(edits))
        self.limits = torch.tensor(fitted.thresholds(MIN_EDIT_PROB))

    @torch.no_grad()
    def strength(self, texts: list[str]) -> torch.Tensor:
        """How strongly texts call edits, as multiples of their thresholds (texts, M)."""
        read = token_states(self.loaded, self.site, texts, batch_size=32, on_progress=ignore_progress, stage="")
        return text_edit_probs(self.late_interaction, read.states.float(), read.text, len(texts)) / self.limits


def silent(edits: list[Edit], records: list[Edit], chance: random.Random) -> dict[str, list[str]]:
    """Prompts that should find nothing, by what they are; `records` are about other subjects."""
    about = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    return {
        "same question, other subject": [
            edit.prompt.replace(str(edit.subject), str(chance.choice(records).subject)) for edit in about
        ],
        "other records": [record.prompt for record in records[:200]],
        "unrelated prompts": [probe.prompt for edit in edits for probe in edit.locality[:1]],
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--first", type=int, default=0, help="the first record that is edited")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--asked", type=int, default=50, help="rephrases that are asked in every form")
    arguments = parser.parse_args()
    checkpoint = Checkpoint(arguments.model)
    loaded = load_model(arguments.model, LoadOptions(device="cpu"), layers=None)
    site = router_site(loaded, find_site(arguments.model, checkpoint))
    started = time.perf_counter()
    heads = train_projections(loaded, site, str(arguments.model), texts=600, batch_size=32, on_progress=ignore_progress)
    console = Console(width=160)
    console.print(f"learned in {time.perf_counter() - started:.0f} s")
    for path in arguments.data:
        console.print(measured(loaded, site, heads, path, arguments))


def measured(loaded: Loaded, site: Site, heads: RouterHeads, path: Path, arguments: argparse.Namespace) -> Table:
    """The table of one file of records."""
    read = list(read_edits(path))
    last = arguments.first + arguments.edits
    edits = read[arguments.first : last]
    own = {edit.subject for edit in edits}
    records = [record for record in read[last : last + 400] if record.subject not in own]
    finder, chance = Finder(loaded, site, heads, edits), random.Random(1)
    table = Table("prompts", "found the edit", "found another", title=f"{path.name} {arguments.first}:{last}")
    step = max(1, len(edits) // arguments.asked)
    asked = [(place, edit) for place, edit in list(enumerate(edits))[::step] if edit.rephrases]
    for kind in ("as taught", "rephrased"):
        shares = []
        for form in usable_forms(loaded.tokenizer):
            texts = [
                form.render(loaded.tokenizer, edit.prompt if kind == "as taught" else edit.rephrases[0])
                for _, edit in asked
            ]
            strength = finder.strength(texts)
            best, which = strength.max(1)
            opened = best > 1
            right = torch.tensor(
                [edits[place].prompt == edit.prompt for place, (_, edit) in zip(which.tolist(), asked, strict=True)]
            )
            shares.append((form.trained, float((opened & right).float().mean())))
            other = float((opened & ~right).float().mean())
            table.add_row(f"{kind}, {form.name}{'' if form.trained else ' *'}", f"{shares[-1][1]:.2f}", f"{other:.2f}")
        for trained in (True, False):
            some = [share for was, share in shares if was == trained]
            table.add_row(
                f"{kind}, mean of forms {'trained' if trained else 'never trained'}", f"{sum(some) / len(some):.3f}", ""
            )
    for name, texts in silent(edits, records, chance).items():
        if texts:
            table.add_row(name, "", f"{float((finder.strength(texts).amax(1) > 1).float().mean()):.3f}")
    same = [(place, edit) for place, edit in enumerate(edits) if edit.subject and edit.subject in edit.prompt]
    questions = about(same, chance)
    strength = finder.strength(questions)
    mine = torch.tensor([float(strength[row, place]) for row, (place, _) in enumerate(same)])
    table.add_row("other question, same subject", "", f"{float((mine > 1).float().mean()):.3f}")
    return table


def about(same: list[tuple[int, Edit]], chance: random.Random) -> list[str]:
    """A made-up question about each edit's subject that shares no long word with its prompt."""
    plain = [wording for ways in rewordings() for wording in ways]
    found = []
    for _, edit in same:
        words = {word for word in edit.prompt.lower().replace("?", "").split() if len(word) > 3}
        drawn = chance.sample(plain, 40)
        other = next(text for text in drawn if not words & set(text.lower().replace("?", "").split()))
        found.append(worded(other, str(edit.subject)))
    return found


if __name__ == "__main__":
    main()
