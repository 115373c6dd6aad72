"""FT-L: fine-tuning of one value matrix, one edit after the other (Zhu et al. 2020; Meng et al. 2022, app. E.1).

The loss is that of the target's tokens after the prompt. Everything below the matrix and its keys stay as they are, so
each edit is captured once, and its steps run the layers above only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, EditByEdit, method, require_finite
from wisecli.bench.methods.weights.weight_editing import WeightEditing, at_depth, captured_rows, encode_row
from wisecli.edits.record import Edit
from wisecli.models.running.activations import Activations
from wisecli.models.running.upper_layers import upper_logits


@dataclass(frozen=True)
class FtLSettings:
    """Settings. ``layer`` of ``of`` is a depth; no weight moves further than ``limit`` within one edit, for a matrix of
    ``width`` columns: as many more columns move the output as much more, so narrower matrices may move further.
    """

    # EasyEdit's for Llama-7B, which the WISE paper compares with.
    layer: int = 21
    of: int = 32
    # Meng et al. 2022, app. E.1: Adam, 25 steps at most, stopped at a loss of .03; the bound is that for GPT-2 XL.
    rate: float = 5e-4
    steps: int = 25
    stop_loss: float = 0.03
    limit: float | None = 5e-4
    width: int = 6400


@method("ft-l")
class FtL(WeightEditing, EditByEdit):
    """Adam on one matrix, each weight held within a bound of what it was before the edit (an L∞ constraint)."""

    stage = "fine-tuning"

    def __init__(self, bench: Bench, settings: FtLSettings | None = None) -> None:
        self.settings = settings or FtLSettings()
        super().__init__(bench, [at_depth(bench, self.settings.layer, self.settings.of)])
        limit, width = self.settings.limit, self.settings.width
        self.limit = None if limit is None else limit * width / self.sites[0].d_ff

    def penalty(self, delta: Tensor) -> Tensor:
        """Return what is added to the loss for a change (d, d_ff): nothing."""
        return delta.new_zeros(())

    def loss(self, part: Activations, delta: Tensor) -> Tensor:
        """Return the mean cross-entropy of the target's tokens under a change (d, d_ff) of the matrix.

        Args:
            part: captured with the base matrix.
        """
        hidden = part.with_update(part.keys.float() @ delta.T)
        logits = upper_logits(self.bench.loaded.model, self.sites[0], part, hidden, part.batch.labelled)
        return F.cross_entropy(logits.float(), part.batch.targets)

    def learn(self, edit: Edit) -> None:
        """Fine-tune on one edit."""
        settings, start = self.settings, self.deltas[0]
        part = captured_rows(self.bench, self.sites[0], [encode_row(self.bench, edit.prompt, edit)])
        delta = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=settings.rate)
        for _ in range(settings.steps):
            loss = self.loss(part, delta)
            require_finite(loss, f"edit {edit.id!r}")
            if loss < settings.stop_loss:
                break
            optimizer.zero_grad()
            (loss + self.penalty(delta)).backward()
            optimizer.step()
            if self.limit is not None:
                delta.data.clamp_(start - self.limit, start + self.limit)
        self.deltas[0] = delta.detach()
