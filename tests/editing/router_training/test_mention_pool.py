"""What is kept of mentions for learning, against the states themselves."""

import torch
from torch.nn import functional as F

from wisecli.editing.router_training.mention_pool import MentionPool, PoolPart, StateComponents
from wisecli.models.synthetic.gate_examples import WHOLE_PROMPTS
from wisecli.models.synthetic.request_examples import Example
from wisecli.routing.gating.request_gate import Mention

WIDTH, FEATURES = 12, 3


def mentions_of(sizes: list[int], chance: torch.Generator) -> list[Mention]:
    """Mentions of so many tokens each, with what two gates read of them."""
    return [
        Mention(torch.randn(n, 2 * WIDTH, generator=chance), torch.randn(n, FEATURES, generator=chance)) for n in sizes
    ]


def test_weights_of_components_are_those_of_states() -> None:
    chance = torch.Generator().manual_seed(6)
    states = torch.randn(50, WIDTH, generator=chance) * torch.arange(1, WIDTH + 1) + 3
    components = StateComponents(states)
    read = torch.randn(5, WIDTH + 1, generator=chance)
    folded = components.folded_into({"request_gate.read": read})["request_gate.read"]
    mapped = F.linear(components(states), read[:, :-1], read[:, -1])
    torch.testing.assert_close(F.linear(states, folded[:, :-1], folded[:, -1]), mapped, rtol=1e-4, atol=1e-3)


def test_a_pool_has_each_mention_with_what_each_gate_reads_of_it() -> None:
    chance, sizes = torch.Generator().manual_seed(7), [3, 1, 4, 2, 5]
    mentions = mentions_of(sizes, chance)
    components = [StateComponents(torch.randn(40, WIDTH, generator=chance)) for _ in range(2)]
    examples = [Example(number, "", number % 2 == 0) for number in range(len(sizes))]
    parts = [PoolPart.of(mentions[own], examples[own], components) for own in (slice(2), slice(2, 5))]
    pool = MentionPool(parts, len(sizes), torch.device("cpu"))
    assert not parts
    assert pool.asks.tolist() == [True, False, True, False, True]
    assert pool.held_out.tolist() == [False, False, False, False, True]
    for number, mapped in enumerate(components):
        batch = pool.of_gate(number, 2).batch(torch.tensor([3, 0]))
        wanted = torch.cat([mapped(mentions[place].states.chunk(2, -1)[number]) for place in (3, 0)])
        torch.testing.assert_close(batch.states, wanted, rtol=2e-3, atol=5e-3)
        features = torch.cat([mentions[place].features for place in (3, 0)])
        torch.testing.assert_close(batch.features, features, rtol=2e-3, atol=2e-3)
        assert batch.mention_index.tolist() == [0, 0, 1, 1, 1]


def test_whole_prompts_and_questions_behind_long_texts_come_more_often_in_a_round() -> None:
    chance, long = torch.Generator().manual_seed(8), "long " * 150
    prompts = [("", True, "kinds"), (long, True, "kinds"), (long, False, "kinds"), (long, True, WHOLE_PROMPTS)]
    examples = [Example(0, *prompt) for prompt in prompts] + [Example(3, "held out", True)]
    mentions, components = mentions_of([2] * len(examples), chance), [StateComponents(torch.randn(40, 2 * WIDTH))]
    pool = MentionPool([PoolPart.of(mentions, examples, components)], 4, torch.device("cpu"))
    batches = pool.epochs(4)
    assert sorted(torch.cat([next(batches), next(batches)]).tolist()) == [0, 1, 1, 2, *[3] * 4]
