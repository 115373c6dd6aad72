"""The first gate and the deep one together, against each alone."""

import math

import pytest
import torch
from torch import Tensor

from wisecli.routing.gating.gates import MIN_ASK_PROB, MIN_FIRST_PROB, Gates
from wisecli.routing.gating.request_gate import (
    DEEP_GATE,
    DEEP_LOGIT_OFFSET,
    FEATURE_COUNT,
    LOGIT_OFFSET,
    REQUEST_GATE,
    Mention,
    RequestGate,
    batch_mentions,
)

D, READ, HEADS, VALUES, MIXED, COUNT = 6, 5, 3, 4, 7, 200


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    chance, seen = torch.Generator().manual_seed(4), READ + FEATURE_COUNT + 1
    shapes = ((READ, D + 1), (HEADS, seen), (HEADS * VALUES, seen), (MIXED, HEADS * VALUES + 1), (1, MIXED + 1))
    found = {LOGIT_OFFSET: torch.tensor([-1.0, 0.5]), DEEP_LOGIT_OFFSET: torch.tensor([0.3, -0.4])}
    for names in (REQUEST_GATE, DEEP_GATE):
        found |= {name: torch.randn(shape, generator=chance) for name, shape in zip(names, shapes, strict=True)}
    return found


def test_a_prompt_that_the_first_gate_refuses_clearly_is_refused_whatever_the_deep_one_says(
    tensors: dict[str, Tensor],
) -> None:
    chance = torch.Generator().manual_seed(5)
    states, features = torch.randn(COUNT, 3, 2 * D, generator=chance), torch.randn(COUNT, 3, FEATURE_COUNT)
    edits, probs = torch.arange(COUNT) % 2, torch.rand(COUNT, generator=chance)

    def alone(names: tuple[str, ...], offset: str, columns: slice) -> Tensor:
        own = {
            name: tensors[other] for name, other in zip((*REQUEST_GATE, LOGIT_OFFSET), (*names, offset), strict=True)
        }
        mentions = [Mention(*pair) for pair in zip(states[..., columns], features, strict=True)]
        return RequestGate(own)(batch_mentions(mentions), edits, probs)

    first, deep = alone(REQUEST_GATE, LOGIT_OFFSET, slice(D)), alone(DEEP_GATE, DEEP_LOGIT_OFFSET, slice(D, None))
    gates = Gates.of(tensors)
    found = gates.ask_probs(batch_mentions([*map(Mention, states, features)]), edits, probs)
    mean, refused = ((first + 2 * deep) / 3 - math.log(2)).sigmoid(), first.sigmoid() <= MIN_FIRST_PROB
    assert torch.allclose(found[~refused], mean[~refused], atol=1e-5)
    assert (found[refused] <= MIN_FIRST_PROB).all()
    assert (mean[refused] > MIN_ASK_PROB).any()  # some are refused against the deep gate
    assert gates.bar == MIN_ASK_PROB


def test_without_the_deep_gates_states_what_it_may_let_through_opens(tensors: dict[str, Tensor]) -> None:
    gates = Gates(RequestGate(tensors), RequestGate.deep(tensors))
    assert gates.bar == MIN_FIRST_PROB
    mention = batch_mentions([Mention(torch.randn(3, D), torch.randn(3, FEATURE_COUNT))])
    edits, probs = torch.zeros(1, dtype=torch.long), torch.ones(1)
    expected = gates.first(mention, edits, probs).sigmoid()
    assert torch.allclose(gates.ask_probs(mention, edits, probs), expected)


def test_a_memory_without_a_deep_gate_decides_by_the_first(tensors: dict[str, Tensor]) -> None:
    gates = Gates.of({name: tensor for name, tensor in tensors.items() if name not in DEEP_GATE})
    assert (gates.deep, gates.both, gates.bar) == (None, False, MIN_ASK_PROB)
