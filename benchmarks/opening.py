"""Which prompts open which edit, and how sure they must be to do it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wisecli.evaluation.edited_model import EditedModel
from wisecli.routing.deciding.decision import Decision
from wisecli.routing.deciding.prompt_window import UNROUTED

# Probabilities of asking from which an edit opens; at the last the gate has no say.
ASK_PROBS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, -1.0)
_BATCH = 16  # prompts
# Prompts, each with the place of its edit.
Prompts = list[tuple[str, int]]


@torch.no_grad()
def decided(edited: EditedModel, texts: Sequence[str]) -> list[Decision]:
    """Return the decision on each prompt; prompts of like length are read together."""
    decoder, device = edited.decoder, edited.model.device
    rows = [edited.tokenizer(text)["input_ids"] for text in texts]
    decisions: dict[int, Decision] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        ids = torch.zeros(len(batch), len(rows[batch[-1]]), dtype=torch.long, device=device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, index in enumerate(batch):
            ids[row, : len(rows[index])] = torch.tensor(rows[index])
            mask[row, : len(rows[index])] = True
        decision = decoder.decide(ids, mask, decoder.wise_marks.ends_in(ids, mask))
        decisions |= {index: _row(decision, row) for row, index in enumerate(batch)}
    return [decisions[index] for index in range(len(rows))]


def _row(decision: Decision, row: int) -> Decision:
    one = slice(row, row + 1)
    ask_prob, second = (None if some is None else some[one] for some in (decision.ask_prob, decision.second))
    memory, ratio, nearest = decision.memory[one], decision.score_ratio[one], decision.nearest[one]
    return Decision(memory, ratio, nearest, decision.scores[one], ask_prob=ask_prob, second=second)


def shares(edited: EditedModel, prompts: Prompts) -> dict[str, float]:
    """Return the share of prompts that open their own edit, at each of ``ASK_PROBS``."""
    opened = []
    for one, (_, edit) in zip(decided(edited, [text for text, _ in prompts]), prompts, strict=True):
        mentioned = int(one.nearest[0]) == edit and float(one.score_ratio[0]) > 1
        if one.second is not None and int(one.second[0]) != UNROUTED:
            mentioned = edit in (int(one.memory[0]), int(one.second[0]))
        opened.append((mentioned, 1.0 if one.ask_prob is None else float(one.ask_prob[0])))
    count = {least: sum(mentioned and prob > least for mentioned, prob in opened) for least in ASK_PROBS}
    return {f"{least:g}" if least >= 0 else "no gate": count[least] / len(opened) for least in ASK_PROBS}
