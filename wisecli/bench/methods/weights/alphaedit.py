"""AlphaEdit: MEMIT in the null space of what is to be kept (Fang et al. 2025, arXiv 2410.02355, section 3).

Targets, keys and residuals are MEMIT's. With P the projection onto the directions in which keys of unrelated text
hardly ever point, K_p the keys of earlier edits, K those of these and R what is still missing at them:

    Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λ I)⁻¹,  the least of  ‖Δ P K - R‖² + λ ‖Δ P‖² + ‖Δ P K_p‖²
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wisecli.bench.methods.base import METHODS, Bench, UnsuitableError
from wisecli.bench.methods.weights.memit import Memit, MemitSettings
from wisecli.bench.methods.weights.weight_editing import seen_moment
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite


@dataclass(frozen=True)
class AlphaEditSettings:
    """Settings. Directions with a second moment below ``threshold`` are free to change; ``weight`` is λ.

    The authors' are .02 and 10, for keys as large as theirs. Keys of other models are of other sizes, so here both
    count in parts of the mean second moment over all directions. In these parts a threshold of 2 is best of .02, .2
    and 2, with a λ of 10 rather than 1,000, for 50 edits of zsRE in SmolLM2-135M (``benchmarks/rivals.py``).
    """

    threshold: float = 2.0
    weight: float = 10.0


class AlphaEdit(Memit):
    """Edits in batches, each of which spares the keys of all before it.

    Raises:
        UnsuitableError: as for MEMIT; or no direction is free.
    """

    def __init__(
        self,
        bench: Bench,
        settings: MemitSettings | None = None,
        space: AlphaEditSettings | None = None,
        *,
        batch: int | None = None,
    ) -> None:
        self.space = space or AlphaEditSettings()
        self._weights: list[float] = []
        super().__init__(bench, settings, batch=batch)
        self._earlier = [torch.zeros_like(projection) for projection in self._statistics]

    def statistic(self, site: MatrixSite) -> Tensor:
        """Return the projection P (d_ff, d_ff) onto the free directions, in float64."""
        sizes, directions = torch.linalg.eigh(seen_moment(self.bench, site))
        self._weights.append(self.space.weight * float(sizes.mean()))
        free = directions[:, sizes < self.space.threshold * sizes.mean()]
        if not free.shape[1]:
            raise UnsuitableError(f"unrelated text leaves no direction free in {site.module}")
        projection: Tensor = free @ free.T
        return projection

    def change(self, index: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """Return what is added (d, d_ff) to a site's matrix; from then on these keys are spared, too."""
        wide = keys.double()
        found = constrained(
            residuals.double(), wide, self._statistics[index], self._earlier[index], self._weights[index]
        )
        self._earlier[index] += wide.T @ wide
        return found.float()

    def state(self) -> dict[str, Tensor]:
        """Return the changes, and the keys that are spared."""
        return {**super().state(), **{f"earlier {index}": moment for index, moment in enumerate(self._earlier)}}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored changes and keys."""
        super().restore(state, portions)
        self._earlier = [state[f"earlier {index}"].to(moment) for index, moment in enumerate(self._earlier)]


def constrained(residuals: Tensor, keys: Tensor, projection: Tensor, earlier: Tensor, weight: float) -> Tensor:
    """Return ``Rᵀ K P (E P + Kᵀ K P + λ I)⁻¹`` (d, d_ff), for residuals (n, d), keys (n, d_ff) and ``E = K_pᵀ K_p``."""
    whole = (earlier + keys.T @ keys) @ projection
    whole.diagonal().add_(weight)
    delta: Tensor = torch.linalg.solve(whole.T, projection.T @ keys.T @ residuals).T
    return delta


# As in the paper.
METHODS.add("alphaedit", partial(AlphaEdit, batch=100))
