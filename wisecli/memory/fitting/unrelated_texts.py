"""How likely unrelated texts mean the edits of a memory; only those that may mean any are compared in full."""

import math
from typing import NamedTuple

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


class TextProbs(NamedTuple):
    """The probability that each text means each edit, ``probs`` (texts, M), and the kept prompts that any text was
    compared with in full, ``possible`` (c,), ascending; ``None`` if those were all.
    """

    probs: Tensor
    possible: Tensor | None


def unrelated_edit_probs(
    late_interaction: LateInteraction, heads: RouterHeads, possible: Tensor | None = None
) -> TextProbs:
    """Return how likely the unrelated texts that heads keep mean each edit; all else as of :func:`text_edit_probs`."""
    count = int(heads.text.max()) + 1
    return text_edit_probs(late_interaction, heads.unrelated.float(), heads.text.long(), count, possible)


def text_edit_probs(
    late_interaction: LateInteraction, states: Tensor, text: Tensor, count: int, possible: Tensor | None = None
) -> TextProbs:
    """Return how likely texts mean each edit, from the states of their tokens (n, d).

    Args:
        text: which text each token is of (n,).
        count: how many texts there are.
        possible: kept prompts (p,), ascending, of which it is known that no text need be compared with others.
    """
    probs, tokens = torch.empty(count, late_interaction.edits), Groups(text, count)
    few = has_quick_int8() and len(late_interaction.prompt_to_edit) >= _MANY
    if few and possible is not None:
        late_interaction = _with_prompts(late_interaction, possible)
    prompts = len(late_interaction.prompt_to_edit)
    compared = torch.zeros(prompts, dtype=torch.bool)
    # Tokens of subjects come first.
    subjects = int((late_interaction.token_to_prompt < prompts).sum()) if few else 0
    kept = QuickVectors.of(late_interaction.prompt_token_embeddings[:subjects])
    for part in tokens.sizes.argsort(stable=True).split(_TEXTS):
        rows, there = tokens.padded(part)
        # What is no token of a text is its first once more, which changes no maximum.
        query = late_interaction.project(states[rows], torch.ones_like(there))
        if few:
            chosen = _possible_prompts(late_interaction, query, kept)
            compared[chosen] = True
            probs[part] = _with_prompts(late_interaction, chosen).edit_probs(query)
        else:
            probs[part] = late_interaction.edit_probs(query)
    if not few:
        return TextProbs(probs, None)
    found = compared.nonzero().flatten()
    return TextProbs(probs, found if possible is None else possible[found])


def _possible_prompts(late_interaction: LateInteraction, query: ProjectedPrompts, kept: QuickVectors) -> Tensor:
    """Return the kept prompts whose subjects some texts may have, and the likeliest for each text: (c,), ascending.

    Further kept prompts make none of the others one of these.

    Args:
        kept: the first of its tokens, those of subjects.
    """
    count, texts = len(late_interaction.prompt_to_edit), len(query.mask)
    columns = QuickVectors.of(query.projected[0].transpose(0, 1).flatten(0, 1))  # W · B
    scores = torch.zeros(count, texts)
    for rows, near in highest_in_parts(kept, columns, texts):
        weights = late_interaction.token_weights[rows, None]
        scores.index_add_(0, late_interaction.token_to_prompt[rows], near * weights)
    odds = math.log(HOPELESS / (1 - HOPELESS))
    hopeless = float(late_interaction.logit_offset[0]) + odds / float(late_interaction.logit_scale[0])
    least = scores.topk(MIN_COMPARED_PROMPTS, 0).values[-1].clamp(max=hopeless) - 2 * _SLACK
    return (scores >= least).any(1).nonzero().flatten()


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
