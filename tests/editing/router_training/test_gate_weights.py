"""Gates of which the mean is taken, and what they are learned from."""

import itertools

import torch

from wisecli.editing.router_training import gate_weights
from wisecli.editing.router_training.gate_weights import mean_gate, train_and_calibrate
from wisecli.editing.router_training.mention_pool import MentionPool, PoolPart, StateComponents
from wisecli.models.synthetic.request_examples import Example
from wisecli.progress import Event, ignore_progress
from wisecli.routing.gating.name_features import NAME_FEATURE_COUNT
from wisecli.routing.gating.request_gate import FEATURE_COUNT, REQUEST_GATE, Mention, batch_mentions, log_odds
from wisecli.routing.gating.sentence_features import SENTENCE_FEATURE_COUNT

FEATURES = FEATURE_COUNT + SENTENCE_FEATURE_COUNT + NAME_FEATURE_COUNT


def random_gate(width: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = 5 + FEATURES + 1
    shapes = ((5, width + 1), (3, inputs), (12, inputs), (6, 13), (1, 7))
    return {name: torch.randn(shape, generator=chance) for name, shape in zip(REQUEST_GATE, shapes, strict=True)}


def some_mentions(count: int, width: int, chance: torch.Generator) -> list[Mention]:
    sizes = torch.randint(2, 9, (count,), generator=chance).tolist()
    return [Mention(torch.randn(n, width, generator=chance), torch.randn(n, FEATURES, generator=chance)) for n in sizes]


def test_the_mean_gate_has_the_mean_log_odds() -> None:
    chance = torch.Generator().manual_seed(3)
    gates, mentions = [random_gate(11, chance) for _ in range(3)], batch_mentions(some_mentions(7, 11, chance))
    mean = torch.stack([log_odds(gate, mentions) for gate in gates]).mean(0)
    torch.testing.assert_close(log_odds(mean_gate(gates), mentions), mean, rtol=1e-4, atol=1e-4)


def test_what_asks_is_told_from_what_mentions_in_the_same_way_each_time() -> None:
    chance, asks = torch.Generator().manual_seed(4), [number % 2 == 0 for number in range(400)]
    mentions = [
        one._replace(states=one.states + (1.5 if ask else -1.5))
        for one, ask in zip(some_mentions(len(asks), 16, chance), asks, strict=True)
    ]
    examples = [Example(number // 4, "", ask) for number, ask in enumerate(asks)]
    events: list[Event] = []
    torch.manual_seed(0)
    components = StateComponents(torch.cat([one.states for one in mentions]))
    parts = [PoolPart.of(mentions[own], examples[own], [components]) for own in (slice(150), slice(150, 400))]
    pool = MentionPool(parts, 100, torch.device("cpu"))
    weights = train_and_calibrate(pool, components, 60, events.append)
    assert [event.done for event in events] == list(range(1, 61))
    assert {event.total for event in events} == {60}
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    opened = log_odds(weights, batch_mentions(mentions)) > 0
    held_out = torch.tensor([one.fact >= 85 for one in examples])
    right = opened == torch.tensor(asks)
    assert right[held_out].float().mean() > 0.95
    torch.manual_seed(0)
    again = train_and_calibrate(pool, components, 60, ignore_progress)
    assert all(torch.equal(weights[name], again[name]) for name in REQUEST_GATE)
    # Gates beside each other: each reads in its own way, and pools what it alone has read.
    parts = weights["request_gate.read"].chunk(gate_weights._GATES)
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(parts, 2))
    shares = weights["request_gate.attend"][:, : len(weights["request_gate.read"])].chunk(gate_weights._GATES)
    read = len(parts[0])
    for number, share in enumerate(shares):
        others = torch.ones(share.shape[1], dtype=torch.bool)
        others[number * read : (number + 1) * read] = False
        assert not share[:, others].any() and share[:, ~others].all()


def test_gradients_of_each_gate_are_shortened_as_if_it_were_alone() -> None:
    chance = torch.Generator().manual_seed(5)
    together = [torch.nn.Parameter(torch.zeros(3, 4, 5)), torch.nn.Parameter(torch.zeros(3, 2, 3))]
    scales = torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    for weight in together:
        weight.grad = torch.randn(weight.shape, generator=chance) * scales
    alone = [[torch.nn.Parameter(weight[number].detach()) for weight in together] for number in range(3)]
    for number, weights in enumerate(alone):
        for weight, of_all in zip(weights, together, strict=True):
            assert of_all.grad is not None
            weight.grad = of_all.grad[number].clone()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
    gate_weights._clip_gradients(together)
    for place, of_all in enumerate(together):
        expected = torch.stack([grad for weights in alone if (grad := weights[place].grad) is not None])
        torch.testing.assert_close(of_all.grad, expected, rtol=1e-4, atol=1e-6)
