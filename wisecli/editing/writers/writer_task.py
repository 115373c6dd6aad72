"""What both writers are given, what they report, and what they give back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings
from wisecli.models.layout.site import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WriterTask:
    """What a writer works on, but for the batches.

    ``unrelated`` (n, d_ff) are keys that must stay under the margin; ``unit`` is what 1 of α, β, γ means in ``‖Δ a‖₂``.
    ``matrix`` is ``W`` (d, d_ff), where a writer must know it; ``median_state_norm`` the length of a state that
    attention does not rest on, where residuals are stretched by it.
    """

    model: PreTrainedModel
    site: Site
    mask: Mask
    unrelated: Tensor
    unit: float
    settings: EditSettings
    matrix: Tensor | None = None
    median_state_norm: float = math.inf


@dataclass(frozen=True)
class Progress:
    """One finished pass (of the sequential schedule: one edit): mean loss, share of target tokens that are right."""

    step: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Written:
    """The values that fill the mask, and the mean loss after every pass (of the sequential schedule: every edit).

    ``calls`` are, by the numbers of edits, how strongly their rows called the change once they had been trained; only
    of the sequential schedule. ``kept`` is the share that is left of ``W``, which the change takes the rest from.
    """

    values: Tensor
    losses: tuple[float, ...]
    calls: Mapping[int, float] = field(default_factory=dict)
    kept: float = 1.0
