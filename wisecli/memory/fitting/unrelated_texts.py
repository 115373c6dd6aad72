"""How likely unrelated texts mean the edits of a memory; only those that may mean any are compared in full."""

import math

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.environment import has_quick_int8
from wisecli.memory.merging.near_prompts import Groups
from wisecli.memory.merging.quick_cosines import QuickVectors, highest_in_parts
from wisecli.routing.deciding.late_interaction import (
    HOPELESS,
    LATE_INTERACTION,
    MIN_COMPARED_PROMPTS,
    LateInteraction,
    ProjectedPrompts,
)

# Texts that are compared at a time.
_TEXTS = 32
# From so many kept prompts on, those are looked for first with few bits; the scores of those are off by less.
_MANY, _SLACK = 2048, 0.02


def unrelated_edit_probs(late_interaction: LateInteraction, heads: RouterHeads) -> Tensor:
    """Return the probability that each unrelated text that heads keep means each edit: (texts, M)."""
    return text_edit_probs(late_interaction, heads.unrelated.float(), heads.text.long(), int(heads.text.max()) + 1)


def text_edit_probs(late_interaction: LateInteraction, states: Tensor, text: Tensor, count: int) -> Tensor:
    """Return the probability that each text means each edit, from its tokens' states (n, d): (texts, M)."""
    probs, tokens = torch.empty(count, late_interaction.edits), Groups(text, count)
    prompts = len(late_interaction.prompt_to_edit)
    few = has_quick_int8() and prompts >= _MANY
    # Tokens of subjects come first.
    subjects = int((late_interaction.token_to_prompt < prompts).sum()) if few else 0
    kept = QuickVectors.of(late_interaction.prompt_token_embeddings[:subjects])
    for part in tokens.sizes.argsort(stable=True).split(_TEXTS):
        rows, there = tokens.padded(part)
        # What is no token of a text is its first once more, which changes no maximum.
        query = late_interaction.project(states[rows], torch.ones_like(there))
        compared = _with_possible_prompts(late_interaction, query, kept) if few else late_interaction
        probs[part] = compared.edit_probs(query)
    return probs


def _with_possible_prompts(
    late_interaction: LateInteraction, query: ProjectedPrompts, kept: QuickVectors
) -> LateInteraction:
    """Return late interaction with no other kept prompts than those whose subjects some texts may have, and the
    likeliest for each text.

    Args:
        kept: the first of its tokens, those of subjects.
    """
    count, texts = len(late_interaction.prompt_to_edit), len(query.mask)
    columns = QuickVectors.of(query.projected[0].transpose(0, 1).flatten(0, 1))  # W · B
    scores = torch.zeros(count, texts)
    for some, near in highest_in_parts(kept, columns, texts):
        weights = late_interaction.token_weights[some, None]
        scores.index_add_(0, late_interaction.token_to_prompt[some], near * weights)
    odds = math.log(HOPELESS / (1 - HOPELESS))
    hopeless = float(late_interaction.logit_offset[0]) + odds / float(late_interaction.logit_scale[0])
    least = scores.topk(MIN_COMPARED_PROMPTS, 0).values[-1].clamp(max=hopeless) - 2 * _SLACK
    return _with_prompts(late_interaction, (scores >= least).any(1).nonzero().flatten())


def _with_prompts(late_interaction: LateInteraction, prompts: Tensor) -> LateInteraction:
    """Return late interaction with some of the kept prompts (p,)."""
    count = len(late_interaction.prompt_to_edit)
    place = torch.full((2 * count,), -1)
    place[torch.cat([prompts, prompts + count])] = torch.arange(2 * len(prompts))
    prompt = place[late_interaction.token_to_prompt]
    rows = (prompt >= 0).nonzero().flatten()
    tensors = {name: getattr(late_interaction, name.removeprefix("late_interaction.")) for name in LATE_INTERACTION}
    for name in ("prompt_token_embeddings", "token_weights"):
        tensors[f"late_interaction.{name}"] = tensors[f"late_interaction.{name}"][rows]
    tensors["late_interaction.token_to_prompt"] = prompt[rows]
    tensors["late_interaction.prompt_to_edit"] = late_interaction.prompt_to_edit[prompts]
    return LateInteraction(tensors, late_interaction.edits)
