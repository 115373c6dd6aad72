"""What the real model's memory opens for prompts that mention an edit more than once."""

from __future__ import annotations

import pytest
import torch

from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.routing.deciding.prompt_window import UNROUTED

QUOTED = (
    'Letters of the week. A reader asked: "{question}" Nobody here could tell, so we looked it up in the almanac.\n\n'
)


@torch.no_grad()
def opened(edited: EditedModel, pattern: str) -> list[bool]:
    """Whether the pattern with each edit's question in it opens that edit; no other edit may open."""
    found = []
    for number, edit in enumerate(edited.manifest.edits):
        prompt = pattern.replace("{question}", edit.prompt)
        decision = edited.decide(collate([Row(tuple(edited.tokenizer(prompt)["input_ids"]), (2,))]))
        memory = int(decision.memory[0])
        assert memory in (number, UNROUTED)
        found.append(memory == number)
    return found


@pytest.mark.parametrize(
    ("behind", "least", "most"),
    [
        ("{question}", 12, 12),
        ("What did we look it up in?", 0, 0),
        ("Translate into French: {question}", 0, 1),
    ],
)
def test_behind_a_text_that_quotes_a_question_the_last_one_counts(
    edited_chain: EditedModel, behind: str, least: int, most: int
) -> None:
    assert least <= sum(opened(edited_chain, QUOTED + behind)) <= most


def test_in_front_of_a_text_that_quotes_a_question_the_first_one_counts(edited_chain: EditedModel) -> None:
    assert sum(opened(edited_chain, "{question}\n\n" + QUOTED)) == 12
    assert not any(opened(edited_chain, "Where was it looked up?\n\n" + QUOTED))
