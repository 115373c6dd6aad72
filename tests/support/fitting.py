"""Training examples of a tiny model, to fit residuals to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence, Mask, MaskKind, random_mask
from wisecli.config import EditSettings
from wisecli.editing.closed_form import Residuals, fit_residuals
from wisecli.editing.evidence import gather_evidence
from wisecli.editing.hard_negatives import HardNegatives
from wisecli.editing.prompt_variants import AnswerKey
from wisecli.editing.task import Task
from wisecli.editing.training_examples import TrainingExamples
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
from wisecli.routing.whitening import leading, whitening

SETTINGS = EditSettings(residual_steps=150, residual_more=0, residual_rate=0.3, residual_stop=0.3, stop_loss=0.3)


@dataclass(frozen=True, repr=False)
class Bench:
    """A tiny model with batches of all edits, in two groups."""

    loaded: Loaded
    site: Site
    groups: list[list[TrainingExamples]]
    held_back: list[TrainingExamples]

    @property
    def batches(self) -> list[TrainingExamples]:
        return [examples for group in self.groups for examples in group]

    @property
    def unrelated(self) -> Tensor:
        return torch.randn(60, self.site.d_ff, generator=torch.Generator().manual_seed(11)) * 0.3

    def mask(self, kind: MaskKind = "columns", density: float = 0.8) -> Mask:
        return random_mask(self.site, density, kind, torch.Generator().manual_seed(2))

    def task(self, settings: EditSettings = SETTINGS, mask: Mask | None = None) -> Task:
        return Task(self.loaded.model, self.site, mask or self.mask(), self.unrelated, self.unit, settings)

    @property
    def unit(self) -> float:
        """About the length of what the matrix says."""
        weight = self.loaded.model.get_submodule(self.site.module).get_parameter("weight")
        keys = torch.cat([examples.activations.keys.flatten(0, 1) for examples in self.batches])
        return float((keys @ (weight if self.site.transposed else weight.T)).norm(dim=-1).median())

    def residuals(self, settings: EditSettings = SETTINGS) -> Residuals:
        return fit_residuals(self.task(settings), self.groups, lambda _: None)

    @cached_property
    def evidence(self) -> Evidence:
        residuals = self.residuals()

        def find(_keys: Tensor, answers: Sequence[AnswerKey], positions: Tensor) -> Tensor:
            return torch.stack([residuals[answer][int(p)] for answer, p in zip(answers, positions, strict=True)])

        white = whitening(leading(self.unrelated))
        return gather_evidence([*self.batches, *self.held_back], HELD_BACK[0], find, HardNegatives({}, white))


HELD_BACK = (2, "so su sa. ")
