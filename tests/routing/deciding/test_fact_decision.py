"""What the real model's memory opens for prompts that mention an edit more than once."""

import pytest
import torch

from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.routing.deciding.fact_decision import FactDecision
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.gating.gates import MIN_ASK_PROB

QUOTED = (
    'Letters of the week. A reader asked: "{question}" Nobody here could tell, so we looked it up in the almanac.\n\n'
)


@torch.no_grad()
def ask_probs(edited: EditedModel, pattern: str) -> list[float]:
    """How surely the pattern with each edit's question in it asks that edit; no other edit may open."""
    found = []
    for number, edit in enumerate(edited.manifest.edits):
        prompt = pattern.replace("{question}", edit.prompt)
        decision = edited.decide(collate([Row(tuple(edited.tokenizer(prompt)["input_ids"]), (2,))]))
        assert decision.ask_prob is not None
        found.append(float(decision.ask_prob[0]))
        assert int(decision.memory[0]) == (number if found[-1] > MIN_ASK_PROB else UNROUTED)
    return found


def opened(edited: EditedModel, pattern: str) -> list[bool]:
    """Whether the pattern with each edit's question in it opens that edit."""
    return [prob > MIN_ASK_PROB for prob in ask_probs(edited, pattern)]


def opened_by_the_gate_alone(edited: EditedModel, pattern: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The same without a second look at prompts that mention an edit more than once."""
    with monkeypatch.context() as patch:
        patch.setattr(FactDecision, "_mention_at_edge", lambda *_: [])
        return opened(edited, pattern)


@pytest.mark.parametrize("pattern", [QUOTED + "{question}", "{question}\n\n" + QUOTED])
def test_a_question_beside_a_text_that_quotes_it_is_asked(edited_chain: EditedModel, pattern: str) -> None:
    assert sum(opened(edited_chain, pattern)) >= 11


@pytest.mark.parametrize("pattern", [QUOTED + "What did we look it up in?", "Where was it looked up?\n\n" + QUOTED])
def test_what_a_text_alone_quotes_is_left_to_the_gate(
    edited_chain: EditedModel, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened(edited_chain, pattern) == opened_by_the_gate_alone(edited_chain, pattern, monkeypatch)


@pytest.mark.parametrize("task", ["Translate into French: {question}", "How do you say this in Greek?\n{question}"])
def test_a_task_on_what_a_text_quotes_opens_only_where_the_gate_alone_does_or_is_unsure_of_the_task_itself(
    edited_chain: EditedModel, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    by_the_gate = opened_by_the_gate_alone(edited_chain, QUOTED + task, monkeypatch)
    # .3 is asked of it; behind the text its states, and so how sure the gates are, differ from those alone.
    by_itself = [prob > 0.15 for prob in ask_probs(edited_chain, task)]
    found = opened(edited_chain, QUOTED + task)
    assert not any(one and not (gate or own) for one, gate, own in zip(found, by_the_gate, by_itself, strict=True))


@torch.no_grad()
def pairs_opened(edited: EditedModel, pattern: str) -> list[tuple[int, int]]:
    """What the pattern opens with the question of each edit, and the next one's behind it."""
    edits, found = edited.manifest.edits, []
    for number, edit in enumerate(edits):
        following = edits[(number + 1) % len(edits)]
        prompt = pattern.replace("{first}", edit.prompt).replace("{second}", following.prompt)
        decision = edited.decide(collate([Row(tuple(edited.tokenizer(prompt)["input_ids"]), (2,))]))
        assert decision.second is not None
        found.append((int(decision.memory[0]), int(decision.second[0])))
    return found


@pytest.mark.parametrize("pattern", ["{first} {second}", "First: {first}\nThen: {second}", "{first} Besides: {second}"])
def test_who_asks_two_edits_opens_both_in_their_order(edited_chain: EditedModel, pattern: str) -> None:
    count = len(edited_chain.manifest.edits)
    asked = [(number, (number + 1) % count) for number in range(count)]
    found = pairs_opened(edited_chain, pattern)
    assert sum(map(tuple.__eq__, found, asked)) >= 9, found
