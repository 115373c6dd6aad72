"""The gate between what is asked and what is mentioned, against loops over tokens."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.gating.request_gate import (
    CONTEXT_RADIUS,
    FEATURE_COUNT,
    FIRST_TOKENS,
    LAST_TOKENS,
    LOGIT_OFFSET,
    MENTION_RADIUS,
    REQUEST_GATE,
    Request,
    RequestGate,
    batch_mentions,
    mention_features,
    unsureness,
)

D, K, READ, HEADS, VALUES, MIXED = 12, 6, 5, 3, 4, 7


def weights(seed: int = 0) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = (
        (READ, D + 1),
        (HEADS, READ + FEATURE_COUNT + 1),
        (HEADS * VALUES, READ + FEATURE_COUNT + 1),
        (MIXED, HEADS * VALUES + 1),
        (1, MIXED + 1),
    )
    return {name: torch.randn(shape, generator=chance) for name, shape in zip(REQUEST_GATE, shapes, strict=True)}


def request(count: int, seed: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    states = torch.randn(count, D, generator=chance)
    return states, F.normalize(torch.randn(2, count, K, generator=chance), dim=-1)


def edit(seed: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(count, K, generator=chance), dim=-1) for count in (2, 4))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 7, CONTEXT_RADIUS, 3 * CONTEXT_RADIUS])
def test_the_middle_of_a_mention_is_where_the_edits_words_lie_nearest_together(count: int) -> None:
    states, turned = request(count, seed=count)
    own = edit(seed=2)
    scores = []
    for middle in range(count):
        around = [place for place in range(count) if abs(place - middle) <= MENTION_RADIUS]
        score = 0.0
        for head, tokens in enumerate(own):
            best = [max(float(token @ turned[head, place]) for place in around) for token in tokens]
            score += sum(best) / len(best)
        scores.append(score)
    earlier = count // 3
    found = mention_features([Request(states, turned, own, torch.arange(count) < earlier)])[0]
    middle = max(range(count), key=lambda place: (round(scores[place], 5), -place))
    near = [abs(place - middle) <= CONTEXT_RADIUS for place in range(count)]
    read = [place for place in range(count) if near[place] or place < FIRST_TOKENS or place >= count - LAST_TOKENS]
    assert torch.equal(found.states, states[read])
    assert found.features.shape == (len(read), FEATURE_COUNT)
    explained = []
    for head, tokens in enumerate(own):
        best = [max(float(token @ turned[head, place]) for place in range(count)) for token in tokens]
        explained += [min(best), sum(best) / len(best)]
    for row, place in zip(found.features.tolist(), read, strict=True):
        cosines = [max(float(token @ turned[head, place]) for token in tokens) for head, tokens in enumerate(own)]
        away = (place - middle) / 10
        expected = [*cosines, max(cosines), max(-4, min(4, away)), min(4, abs(away))]
        expected += [math.log1p(min(64, edge)) / 4 for edge in (count - 1 - place, place)]
        assert row == pytest.approx([*expected, float(near[place]), float(place < earlier), *explained], abs=1e-5)


def log_odds_by_loops(states: Tensor, features: Tensor, tensors: dict[str, Tensor]) -> float:
    read, attend, value, mix, out = (tensors[name].double() for name in REQUEST_GATE)
    seen = []
    for state, feature in zip(states.double(), features.double(), strict=True):
        seen.append(torch.cat([read[:, :-1] @ state + read[:, -1], feature]))
    pooled = []
    for head in range(HEADS):
        shares = torch.stack([attend[head, :-1] @ one + attend[head, -1] for one in seen]).softmax(0)
        own = slice(head * VALUES, (head + 1) * VALUES)
        values = torch.stack([(value[own, :-1] @ one + value[own, -1]).clamp(min=0) for one in seen])
        pooled.append(shares @ values)
    mixed = (mix[:, :-1] @ torch.cat(pooled) + mix[:, -1]).clamp(min=0)
    return float(out[0, :-1] @ mixed + out[0, -1])


def test_log_odds_are_those_of_loops_whoever_else_is_in_the_batch() -> None:
    tensors = weights()
    gate = RequestGate({**tensors, LOGIT_OFFSET: torch.tensor([0.0, 0.5])})
    mentions = mention_features([Request(*request(count, seed=count), edit(seed=3)) for count in (1, 5, 40, 90)])
    expected = [log_odds_by_loops(one.states, one.features, tensors) for one in mentions]
    assert gate.log_odds(batch_mentions(mentions)).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # What a prompt may mean counts as well, twice what its log-odds lack to .5: .2 are four to one against it.
    probs, less = [0.2, 0.5, 0.99, 0.2], [2 * (math.log(4) + 0.5), 1.0, 0.0, 2 * (math.log(4) + 0.5)]
    lower = [one - 0.5 * (place % 2) - less[place] for place, one in enumerate(expected)]
    found = gate(batch_mentions(mentions), torch.tensor([0, 1, 0, 1]), torch.tensor(probs))
    assert found.tolist() == pytest.approx(lower, rel=1e-3, abs=1e-4)
    for one, alone in zip(mentions, expected, strict=True):
        assert float(gate.log_odds(batch_mentions([one]))) == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_the_less_likely_an_edit_is_meant_the_more_clearly_it_must_ask() -> None:
    probs = torch.tensor([0.1, 0.5, 0.62, 0.63, 0.99, 1.0])
    expected = [2 * (math.log(1 / 9) - 0.5), -1.0, 2 * (math.log(31 / 19) - 0.5), 0.0, 0.0, 0.0]
    assert torch.allclose(unsureness(probs), torch.tensor(expected), atol=1e-5)


def test_an_edit_whose_prompt_is_all_subject_has_a_mention_too() -> None:
    states, turned = request(8, seed=1)
    subject, relation = edit(seed=4)
    found = mention_features([Request(states, turned, (subject, relation[:0]))])[0]
    assert found.features[:, 1].abs().max() == 0
    assert len(found.states) == 8


def test_the_first_word_is_seen_before_the_others() -> None:
    states, turned = request(4, seed=0)
    own = edit(seed=3)
    plain = mention_features([Request(states, turned, own)])[0]
    first = torch.full_like(states[0], 2.0)
    found = mention_features([Request(states, turned, own, first_state=first)])[0]
    assert torch.equal(found.states, torch.cat([first[None], plain.states]))
    assert not found.features[0, :3].any()  # it is like nothing in the edit
