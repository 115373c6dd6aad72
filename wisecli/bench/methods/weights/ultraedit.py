"""UltraEdit: one step from keys and gradients, normalised over all edits so far (Gu et al. 2025, arXiv 2505.14679).

For every target token of an edit and every matrix, h is its key and g the gradient of the loss at what the matrix
gives. Both together are normalised by mean and deviation over the tokens of all edits so far, these among them: ĥ, ĝ.
Then, with H the keys of these edits as they are:

    v = -η ‖ĥ‖² ĝ,    Δ = Vᵀ H (Hᵀ H + I)⁻¹,  the least of  ‖H Δᵀ - V‖² + ‖Δ‖²

Nothing is trained, no subject is needed, and of earlier edits only the two statistics are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.bench.methods.base import Bench, method, require_finite
from wisecli.bench.methods.weights.gradient_factors import gradient_factors
from wisecli.bench.methods.weights.weight_editing import WeightEditing, between_depths, captured_rows, encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import in_batches
from wisecli.progress import Event

_TINY = 1e-8


@dataclass(frozen=True)
class UltraEditSettings:
    """Settings. ``first`` to ``last`` of ``of`` are depths, ``rate`` is η, and ``batch`` edits are written at once.

    Depths and batch are the authors' for GPT-J (value matrices of layers 18 to 26 of 28). As ‖ĥ‖² grows with the number
    of columns, η counts per column here: by the authors' 1e-6 for 16,384 of them it would be .016. The step is in units
    of what the matrices give, whatever size that has, and at .016 no edit takes in SmolLM2-135M. So ``rate`` is that at
    which 100 and 500 edits of zsRE stand best there, by reliability, generalization and locality together, of 1, .5,
    .25 and .1 (``benchmarks/rivals.py --of ultraedit``).
    """

    first: int = 18
    last: int = 26
    of: int = 28
    rate: float = 0.5
    batch: int = 100


class Statistics:
    """Mean and deviation of rows (n, k) that come in parts (Chan et al. 1983)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows."""
        wide = rows.double().cpu()
        count, offset = self.count + len(wide), wide.mean(0) - self.mean
        self.squares += (wide - wide.mean(0)).square().sum(0) + offset.square() * self.count * len(wide) / count
        self.mean += offset * len(wide) / count
        self.count = count

    def normalised(self, rows: Tensor) -> Tensor:
        """Return rows less the mean, in deviations."""
        deviation = (self.squares / max(1, self.count - 1)).sqrt() + _TINY
        return (rows - self.mean.to(rows)) / deviation.to(rows)


@method("ultraedit")
class UltraEdit(WeightEditing):
    """Edits in batches, each in one step.

    Raises:
        UnsuitableError: the model's layers are streamed.
    """

    def __init__(self, bench: Bench, settings: UltraEditSettings | None = None) -> None:
        self.settings = settings or UltraEditSettings()
        super().__init__(bench, between_depths(bench, self.settings.first, self.settings.last, self.settings.of))
        self.portion = self.settings.batch
        self.statistics = [Statistics(site.d_ff + site.d) for site in self.sites]

    def edit(self, edits: Sequence[Edit]) -> None:
        """Write edits, a batch after the other.

        Raises:
            UnsuitableError: the tokenizer leaves nothing of an edit, or its loss is not finite.
        """
        for start in range(0, len(edits), self.settings.batch):
            part = edits[start : start + self.settings.batch]
            for index, (keys, gradients) in enumerate(self.tokens(part)):
                self.deltas[index] = self.deltas[index] + self.change(index, keys, gradients)
            self.bench.on_progress(Event("single steps", start + len(part), len(edits)))

    def tokens(self, edits: Sequence[Edit]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each matrix, keys h (n, d_ff) and gradients g (n, d) of all target tokens, in the model now."""
        model, rows = self.bench.loaded.model, [encode_row(self.bench, edit.prompt, edit) for edit in edits]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.sites]
        for indices in in_batches(rows, self.bench.batch_size):
            part = captured_rows(self.bench, self.sites[0], [rows[index] for index in indices])
            losses, factors = gradient_factors(model, self.sites, part, self.deltas)
            for index, loss in zip(indices, losses, strict=True):
                require_finite(loss, f"edit {edits[index].id!r}")
            labelled = part.batch.labelled
            for own, factor in zip(found, factors, strict=True):
                own.append((factor.padded(factor.keys)[labelled], factor.padded(factor.gradients)[labelled]))
        return [(torch.cat([keys for keys, _ in own]), torch.cat([gradients for _, gradients in own])) for own in found]

    def change(self, index: int, keys: Tensor, gradients: Tensor) -> Tensor:
        """Return Δ (d, d_ff) for keys (n, d_ff) and gradients (n, d) of one matrix."""
        both = torch.cat([keys, gradients], -1)
        self.statistics[index].add(both)
        turned, drawn = self.statistics[index].normalised(both).split([keys.shape[1], gradients.shape[1]], -1)
        values = -self.settings.rate * turned.square().mean(-1, keepdim=True) * drawn
        # As ``Vᵀ (H Hᵀ + I)⁻¹ H``, which is the same and needs an inverse of the tokens' number only.
        inner = keys @ keys.T
        inner.diagonal().add_(1)
        delta: Tensor = values.T @ torch.linalg.solve(inner, keys)
        return delta

    def state(self) -> dict[str, Tensor]:
        """Return the changes and the statistics."""
        kept = super().state()
        for index, statistic in enumerate(self.statistics):
            kept |= {f"mean {index}": statistic.mean, f"squares {index}": statistic.squares}
            kept[f"count {index}"] = torch.tensor(statistic.count)
        return kept

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored changes and statistics."""
        super().restore(state, portions)
        for index, statistic in enumerate(self.statistics):
            statistic.mean, statistic.squares = state[f"mean {index}"], state[f"squares {index}"]
            statistic.count = int(state[f"count {index}"])
