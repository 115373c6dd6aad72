"""The gates of a memory together. Needs torch only; exports carry this very file.

The first gate reads the states by which prompts are compared. A deep gate reads those of a deeper layer, of prompts
that the first one does not clearly refuse, and a mean of their log-odds decides: on wordings that neither was taught
they seldom err together. The deep one errs less on these, so that it counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.routing.gating.request_gate import DEEP_GATE, Mentions, RequestGate

# How likely a prompt must be to ask an edit that it means: gates are shifted so that nearly all questions are. And how
# likely by the first gate alone, for the deep gate to have a say.
MIN_ASK_PROB, MIN_FIRST_PROB = 0.5, 0.2
# The deep gate's share of the mean of both gates' log-odds; and what that must exceed, odds of two to one: in doubt
# no edit opens.
DEEP_SHARE, DOUBT = 2 / 3, math.log(2)


@dataclass(frozen=True)
class Gates:
    """The gate, and the deep gate of a memory that has one; ``both`` says whether that is given its states."""

    first: RequestGate
    deep: RequestGate | None = None
    both: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Gates:
        """Return the gates of tensors, with the states of both to come."""
        deep = DEEP_GATE[0] in tensors
        return cls(RequestGate(tensors), RequestGate.deep(tensors) if deep else None, deep)

    @property
    def bar(self) -> float:
        """How likely a prompt must be to ask an edit; less without the deep gate's states, which may refuse it yet."""
        return MIN_FIRST_PROB if self.deep is not None and not self.both else MIN_ASK_PROB

    def ask_probs(self, mentions: Mentions, edits: Tensor, edit_probs: Tensor) -> Tensor:
        """Return how surely prompts ask the edits (B,) that they mention: (B,).

        Args:
            mentions: of which the states of each token are those of the first gate, and behind them the deep gate's if
                both are given theirs.
            edit_probs: how likely each prompt means its edit (B,).
        """
        each = self.log_odds(mentions, edits, edit_probs)
        first, last = each[0], each[-1]
        mean = first if len(each) == 1 else first.lerp(last, DEEP_SHARE) - DOUBT
        probs: Tensor = mean.where(first.sigmoid() > MIN_FIRST_PROB, mean.minimum(first)).sigmoid()
        return probs

    def log_odds(self, mentions: Mentions, edits: Tensor, edit_probs: Tensor) -> Tensor:
        """Return the log-odds of each gate, above its offsets: (gates, B)."""
        gates = [self.first] if self.deep is None or not self.both else [self.first, self.deep]
        parts = mentions.states.chunk(len(gates), -1)
        given = (mentions._replace(states=states) for states in parts)
        return torch.stack([gate(own, edits, edit_probs) for gate, own in zip(gates, given, strict=True)])
