"""Compares the prompts of many edits with each other: exactly only those with similar subjects.

Thousands of edits are compared with each other, and hardly any two are alike. So subjects are compared first with as
few bits as this processor is quicker with; what that leaves out is certainly below the bar.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction, ProjectedPrompts

# So many tokens are compared at a time that the outcome stays near the core.
_TOKENS = 2048
# Unit vectors that are rounded to eight bits of mantissa have cosines that are off by less than a hundredth.
_OFF = 0.02


class NearPrompts:
    """What edits' own prompts are compared with: all kept prompts of a memory."""

    def __init__(self, late_interaction: LateInteraction) -> None:
        self.late_interaction = late_interaction
        kept = len(late_interaction.prompt_to_edit)
        subject = (late_interaction.token_to_prompt < kept).nonzero().flatten()
        embeddings = late_interaction.prompt_token_embeddings[subject].to(_comparison_dtype())
        self.embeddings = embeddings.split(_TOKENS)
        self.token_to_prompt = late_interaction.token_to_prompt[subject].split(_TOKENS)
        self.token_weights = late_interaction.token_weights[subject, None].float().split(_TOKENS)
        odds = math.log(HOPELESS / (1 - HOPELESS))
        self.least = float(late_interaction.logit_offset[0]) + odds / float(late_interaction.logit_scale[0]) - _OFF

    def __call__(self, query: ProjectedPrompts, own: Tensor) -> Tensor:
        """Return the probability that prompts mean each edit: (B, M); 0 where its subject is far from all tokens.

        Args:
            own: the edit that each prompt is of (B,).
        """
        late_interaction = self.late_interaction
        close = self._scores(query) >= self.least
        mine = late_interaction.prompt_to_edit == own[:, None]
        compared = (close.any(1) | mine.any(0)).nonzero().flatten()
        subject_log_probs = late_interaction.log_probs(query, 0, compared)
        both = (subject_log_probs + late_interaction.log_probs(query, 1, compared)).exp() * (
            (subject_log_probs >= math.log(HOPELESS)) | mine[:, compared]
        )
        probs = subject_log_probs.new_zeros(len(own), late_interaction.edits)
        return probs.scatter_reduce(1, late_interaction.prompt_to_edit[compared].expand_as(both), both, "amax")

    def _scores(self, query: ProjectedPrompts) -> Tensor:
        """Return the approximate score of each kept prompt's subject: (g, B)."""
        rows, width = query.mask.shape
        # What is not there is as the first token that is, which changes no maximum.
        projected_tokens = query.projected[0].where(query.mask[..., None], query.projected[0][:, :1])
        projected_tokens = projected_tokens.transpose(0, 1).flatten(0, 1).T.to(self.embeddings[0].dtype)  # (k, W · B)
        scores = torch.zeros(len(self.late_interaction.prompt_to_edit), rows)
        for embeddings, prompt, weights in zip(self.embeddings, self.token_to_prompt, self.token_weights, strict=True):
            near = (embeddings @ projected_tokens).view(-1, width, rows).amax(1)
            scores.index_add_(0, prompt, near * weights)
        return scores


def _comparison_dtype() -> torch.dtype:
    """The type of numbers that this processor multiplies quickest of those that will do."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.bfloat16 if tiles is not None and tiles() else torch.float32
