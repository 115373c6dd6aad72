"""How surely prompts of many edits mean other edits: only those are compared exactly whose subjects may be alike.

Thousands of edits are compared with each other, and hardly any two are alike. So subjects are compared first with as
few bits as this processor is quicker with; what that leaves out is certainly below the bar.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wisecli.models.running.quick_products import has_bfloat16_tiles
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction, ProjectedPrompts

# So many vectors are compared at a time that the outcome stays near the core.
_VECTORS = 2048
# Unit vectors that are rounded to eight bits of mantissa have cosines that are off by less than a hundredth.
_OFF = 0.02


class NearPrompts:
    """What edits' own prompts are compared with: all kept prompts of a memory."""

    def __init__(self, meaning: LateInteraction) -> None:
        self.meaning = meaning
        kept = len(meaning.whose)
        subject = (meaning.asking < kept).nonzero().flatten()
        self.vectors = meaning.vectors[subject].to(_comparison_dtype()).split(_VECTORS)
        self.asking = meaning.asking[subject].split(_VECTORS)
        self.shares = meaning.shares[subject, None].float().split(_VECTORS)
        odds = math.log(HOPELESS / (1 - HOPELESS))
        self.least = float(meaning.bars[0]) + odds / float(meaning.slopes[0]) - _OFF

    def __call__(self, query: ProjectedPrompts, own: Tensor) -> Tensor:
        """How surely prompts mean each edit: (B, M); 0 where the subject of another edit is not like anything in them.

        Args:
            own: the edit that each prompt is of (B,).
        """
        meaning = self.meaning
        close = self._scores(query) >= self.least
        mine = meaning.whose == own[:, None]
        compared = (close.any(1) | mine.any(0)).nonzero().flatten()
        subject_log_probs = meaning.log_probs(query, 0, compared)
        both = (subject_log_probs + meaning.log_probs(query, 1, compared)).exp() * (
            (subject_log_probs >= math.log(HOPELESS)) | mine[:, compared]
        )
        probs = subject_log_probs.new_zeros(len(own), meaning.edits)
        return probs.scatter_reduce(1, meaning.whose[compared].expand_as(both), both, "amax")

    def _scores(self, query: ProjectedPrompts) -> Tensor:
        """About how near the subject of each kept prompt comes: (g, B)."""
        rows, width = query.mask.shape
        # What is not there is as the first token that is, which changes no maximum.
        projected_tokens = query.projected[0].where(query.mask[..., None], query.projected[0][:, :1])
        projected_tokens = projected_tokens.transpose(0, 1).flatten(0, 1).T.to(self.vectors[0].dtype)  # (k, W · B)
        scores = torch.zeros(len(self.meaning.whose), rows)
        for vectors, asking, shares in zip(self.vectors, self.asking, self.shares, strict=True):
            near = (vectors @ projected_tokens).view(-1, width, rows).amax(1)
            scores.index_add_(0, asking, near * shares)
        return scores


def _comparison_dtype() -> torch.dtype:
    """The type of numbers that this processor multiplies quickest of those that will do."""
    return torch.bfloat16 if has_bfloat16_tiles() else torch.float32
