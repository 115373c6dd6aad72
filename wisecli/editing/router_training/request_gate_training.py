"""How a base model's states tell a request from a mention: learned from made-up facts that are asked and mentioned.

The gate is that of :mod:`wisecli.routing.gating.request_gate`. It is learned behind the projections of late
interaction, which find what is mentioned, from those examples of
:mod:`wisecli.models.synthetic.gate_examples` that late interaction finds. Where it opens is set by facts that
it was not learned from, and so is measured which mentions of them it lets through.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import Projections
from wisecli.editing.router_training.gate_weights import train_and_calibrate
from wisecli.editing.router_training.mention_pool import MentionPool
from wisecli.editing.router_training.mention_reading import FoundMention, MentionReader, fact_prompts
from wisecli.editing.router_training.token_characters import sentence_token_ids, word_starts
from wisecli.editing.router_training.token_states import ReadSites
from wisecli.models.loading import Loaded
from wisecli.models.running.seeding import seeded
from wisecli.models.synthetic.gate_examples import GateExamples
from wisecli.models.synthetic.request_examples import Example
from wisecli.models.synthetic.synthetic_facts import synthetic_facts
from wisecli.progress import ProgressCallback
from wisecli.routing.gating.gates import Gates
from wisecli.routing.gating.request_gate import (
    DEEP_GATE,
    DEEP_LOGIT_OFFSET,
    LOGIT_OFFSET,
    MIN_GATED_PROB,
    REQUEST_GATE,
    TOKEN_MARKS,
    batch_mentions,
)

# Facts, and steps of learning, of all gates at once; with less to learn from, at least so many steps.
_FACTS, _STEPS, _FEWEST_STEPS = 200, 5000, 14
# Prompts by which it is found in which components of states they differ.
_SAMPLED = 500
# Prompts that late interaction finds less likely than this to mean a fact are not learned from.
_FOUND = 0.25
# Requests whose mentions are looked at together.
_AT_A_TIME = 128
# So many facts are mentioned in wordings that nothing is learned from.
_CHECKED = 12


def train_request_gate(
    loaded: Loaded,
    sites: ReadSites,
    projections: Projections,
    *,
    share: float,
    batch_size: int,
    on_progress: ProgressCallback,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a base model's request gate; how many mentions open their fact all the same, of how
    many: (2,).

    Args:
        sites: the layers whose states are read.
        share: of the facts and steps; with less, less is learned.
    """
    rng = random.Random(0)
    facts = list(synthetic_facts(max(8, round(_FACTS * share)), rng))
    drawn = GateExamples(loaded.tokenizer, facts, rng)
    marks = (*sentence_token_ids(loaded.tokenizer), word_starts(loaded.tokenizer))
    token_marks = dict(zip(TOKEN_MARKS, marks, strict=True))
    prompts = fact_prompts(loaded, sites, projections, facts, batch_size, on_progress)
    reader = MentionReader(loaded, sites, projections, token_marks, prompts, batch_size, on_progress)
    steps = max(_FEWEST_STEPS, round(_STEPS * share))
    weights = _learned(reader, list(drawn), len(facts), steps)
    held_back = [one for number in range(len(facts))[-_CHECKED:] for one in drawn.held_back(number)]
    checked = [one for found in reader.found(held_back, MIN_GATED_PROB) for one in found]
    return weights | token_marks, torch.tensor([_opened(weights, checked), len(held_back)])


def _learned(reader: MentionReader, examples: list[Example], facts: int, steps: int) -> dict[str, Tensor]:
    """Return the tensors of the gates, learned in so many steps from examples of so many facts."""
    components = reader.components(random.Random(0).sample(examples, min(_SAMPLED, len(examples))))
    parts = reader.pool(examples, _FOUND, components)
    device = reader.loaded.device
    weights: dict[str, Tensor] = {}
    with seeded(0, device):
        pool = MentionPool(parts, facts, device)
        for number, (own, names) in enumerate(zip(components, (REQUEST_GATE, DEEP_GATE), strict=False)):
            gate = train_and_calibrate(pool.of_gate(number, len(components)), own, steps, reader.on_progress)
            weights |= zip(names, gate.values(), strict=True)
    return weights


def _opened(weights: Mapping[str, Tensor], found: Sequence[FoundMention]) -> int:
    """Return how many of some examples open the fact that they mention."""
    gates = Gates.of({**weights, LOGIT_OFFSET: torch.zeros(1), DEEP_LOGIT_OFFSET: torch.zeros(1)})
    count = 0
    for first in range(0, len(found), _AT_A_TIME):
        some = found[first : first + _AT_A_TIME]
        probs, fact = torch.tensor([one.fact_prob for one in some]), torch.zeros(len(some), dtype=torch.long)
        count += int((gates.ask_probs(batch_mentions([one.mention for one in some]), fact, probs) > gates.bar).sum())
    return count
