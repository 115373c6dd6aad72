"""Which prompts open the edit that they ask, and which open one that they mention, by how sure they must be to ask it.

    python benchmarks/asking.py memory records.jsonl --model model --edits 40

Prompts are in all forms, and in the patterns of all kinds that nothing is learned from, bare and in chat. Only the
decision is looked at; `wise eval` has the answers.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from wisecli.config import LoadOptions
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.prompt_kinds import Fact, Kind, kinds
from wisecli.routing.deciding.decision import Decision

# Chances of asking from which an edit opens; below the last the gate has no say.
CHANCES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, -1.0)
_ROWS = 16
Prompts = list[tuple[str, int]]


@torch.no_grad()
def decided(edited: EditedModel, texts: Sequence[str]) -> list[Decision]:
    """What each prompt decides, those of like length together."""
    decoder = edited.decoder

    rows = [edited.tokenizer(text)["input_ids"] for text in texts]
    found: dict[int, Decision] = {}
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for first in range(0, len(order), _ROWS):
        some = order[first : first + _ROWS]
        ids = torch.zeros(len(some), len(rows[some[-1]]), dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, place in enumerate(some):
            ids[row, : len(rows[place])] = torch.tensor(rows[place])
            real[row, : len(rows[place])] = True
        ids, real = ids.to(edited.model.device), real.to(edited.model.device)
        decision = decoder.decide(ids, real, decoder.wise_marks.ends_in(ids, real))
        found |= {place: _row(decision, row) for row, place in enumerate(some)}
    return [found[place] for place in range(len(rows))]


def _row(decision: Decision, row: int) -> Decision:
    one = slice(row, row + 1)
    asked = None if decision.ask_prob is None else decision.ask_prob[one]
    scores = decision.scores[one]
    return Decision(decision.memory[one], decision.score_ratio[one], decision.nearest[one], scores, ask_prob=asked)


def shares(edited: EditedModel, prompts: Prompts) -> list[float]:
    """How many of the prompts open their own edit, at each of ``CHANCES``."""
    found = decided(edited, [text for text, _ in prompts])
    meant = [
        (
            int(one.nearest[0]) == own and float(one.score_ratio[0]) > 1,
            1.0 if one.ask_prob is None else float(one.ask_prob[0]),
        )
        for one, (_, own) in zip(found, prompts, strict=True)
    ]
    return [sum(opens and asked > chance for opens, asked in meant) / len(meant) for chance in CHANCES]


def of_kind(edited: EditedModel, kind: Kind, edits: Sequence[Edit], chance: random.Random) -> Iterator[tuple[str, int]]:
    """Prompts of a kind around every edit, as it is taught or reworded, bare and in chat."""
    for place, edit in enumerate(edits):
        reworded = edit.rephrases[0] if edit.rephrases and chance.random() < 0.5 else edit.prompt
        question = edit.prompt if edit.subject and edit.subject not in reworded else reworded
        second, other = edits[(place + 1) % len(edits)], edits[(place + 3) % len(edits)]
        also = Fact(second.prompt, second.subject, second.target)
        fact = Fact(question, edit.subject, edit.target, other.target, second=also)
        for chat in (False, True) if edited.tokenizer.chat_template else (False,):
            text = kind.sample_prompt(edited.tokenizer, fact, trained=False, rng=chance, chat=chat)
            if text is not None:
                yield text, place


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path)
    parser.add_argument("records", type=Path, help="the edits that the memory holds, in their order")
    parser.add_argument("--model")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    edited = attach(arguments.memory, model=arguments.model, load=LoadOptions(device=arguments.device))
    edits = list(read_edits(arguments.records))[: arguments.edits]
    table = Table("prompts", "", *(f"{chance:g}" if chance >= 0 else "no gate" for chance in CHANCES), "number")

    def row(name: str, group: str, prompts: Prompts) -> None:
        if prompts:
            table.add_row(name, group, *(f"{share:.2f}" for share in shares(edited, prompts)), str(len(prompts)))

    everything: dict[str, Prompts] = {"as taught": [], "rephrased": [], "mentioned": []}
    for form in usable_forms(edited.tokenizer):
        taught = [(form.render(edited.tokenizer, edit.prompt), place) for place, edit in enumerate(edits)]
        reworded = [(form.render(edited.tokenizer, e.rephrases[0]), at) for at, e in enumerate(edits) if e.rephrases]
        everything["as taught"] += taught
        everything["rephrased"] += reworded
        row(form.name, "rephrased", reworded)
    chance = random.Random(5)
    for kind in kinds().values():
        prompts = list(of_kind(edited, kind, edits, chance))
        everything["mentioned"] += [] if kind.asked else prompts
        row(kind.name, "asked" if kind.asked else "mentioned", prompts)
    for name, prompts in everything.items():
        row("all", name, prompts)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
