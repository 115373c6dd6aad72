"""MEMIT: facts written into the value matrices of several layers (Meng et al. 2023, section 4.3 and algorithm 1).

For each edit a vector z is found that should leave the last of the layers at the subject's last token, so that the
layers above say the target. Then, from the lowest layer up, with R what is still missing of the z's shared out among
the layers that are left, and K the edits' keys in the model as changed so far:

    Δ = R Kᵀ (λ C + K Kᵀ)⁻¹,  the least of  λ · tr(Δ C Δᵀ) + ‖Δ K - R‖²

C is the second moment of keys of unrelated text in the base model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wisecli.bench.methods.base import AT_ONCE, METHODS, Bench, Gradual, UnsuitableError
from wisecli.bench.methods.weights.rome_common import (
    Fact,
    Part,
    SearchSettings,
    find_change,
    look,
    prefixes_for,
    read_fact,
)
from wisecli.bench.methods.weights.weight_editing import WeightEditing, between_depths, second_moment
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.running.activations import capture
from wisecli.models.running.hooks import hooked
from wisecli.progress import Event

# The authors' settings for GPT-J.
SEARCH = SearchSettings(rate=0.5, steps=25, limit=0.75, essence=0.0625, decay=0.5)


@dataclass(frozen=True)
class MemitSettings:
    """Settings. ``first`` to ``last`` of ``of`` are depths, ``weight`` is λ."""

    # The authors' settings for GPT-J: layers 3 to 8 of 28, λ = 15000.
    first: int = 3
    last: int = 8
    of: int = 28
    weight: float = 15000.0
    search: SearchSettings = SEARCH
    # As many as for ROME.
    prefixes: int = 5
    prefix_tokens: int = 10


class Memit(WeightEditing, Gradual):
    """Mass editing, ``batch`` edits at once; all that are given at once by default.

    An edit without a subject in its prompt is written at the prompt's last token, and without a KL term.

    Raises:
        UnsuitableError: there are no unrelated texts, or the matrices' output passes a norm before it joins the
            residual stream, where what is missing there is no sum of what the matrices add.
    """

    def __init__(self, bench: Bench, settings: MemitSettings | None = None, *, batch: int | None = None) -> None:
        self.settings = settings or MemitSettings()
        super().__init__(bench, between_depths(bench, self.settings.first, self.settings.last, self.settings.of))
        if self.sites[-1].norm is not None:
            raise UnsuitableError("it needs the outputs of matrices to add up, and this model normalizes each first")
        self.batch, self.portion, self._targets = batch, batch or 0, list[Tensor]()
        self.prefixes = prefixes_for(bench, self.settings.prefixes, self.settings.prefix_tokens)
        self._statistics = [self.statistic(site) for site in self.sites]

    def steps(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Write edits, a batch after the other; a step for every target that is found."""
        size = self.batch or max(len(edits), 1)
        for start in range(0, len(edits), size):
            facts = [read_fact(self.bench, edit, self.prefixes) for edit in edits[start : start + size]]
            for fact in facts[len(self._targets) :]:
                self._targets.append(self.target(fact))
                self.bench.on_progress(Event("mass edits", start + len(self._targets), len(edits)))
                yield
            self._write(facts, torch.stack(self._targets))
            self._targets = []

    def state(self) -> dict[str, Tensor]:
        """Return the changes, and the targets of a batch that is not written yet."""
        return {**super().state(), **{f"target {index}": target for index, target in enumerate(self._targets)}}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored state."""
        super().restore(state, portions)
        count = sum(name.startswith("target ") for name in state)
        self._targets = [state[f"target {index}"].to(self.deltas[0]) for index in range(count)]

    def statistic(self, site: MatrixSite) -> Tensor:
        """Return a site's statistic of unrelated text: the Cholesky factor of ``λ C`` (d_ff, d_ff), in float64."""
        factor: Tensor = torch.linalg.cholesky(self.settings.weight * second_moment(self.bench, site))
        return factor

    def change(self, index: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """Return what is added (d, d_ff) to a site's matrix for residuals (n, d) and keys (n, d_ff)."""
        return spread(residuals, keys, self._statistics[index])

    def target(self, fact: Fact) -> Tensor:
        """Return the target z (d,) of a fact's last subject token, for the model as edited so far, in float32."""
        top = self.sites[-1]
        with self.applied():
            part = look(self.bench, top, fact)
        hidden = part.activations.hidden[0, part.columns[0]].float()
        return hidden + find_change(self.bench, top, fact, part, self.settings.search, _added, hidden.norm())

    def _write(self, facts: Sequence[Fact], targets: Tensor) -> None:
        """Change the matrices in turn, so that the last layer's states come to the facts' targets (n, d)."""
        for index, site in enumerate(self.sites):
            with self.applied():
                seen = [self._key_and_state(fact, index) for fact in facts]
            keys, states = (torch.stack(parts) for parts in zip(*seen, strict=True))
            residuals = (targets - states) / ((len(self.sites) - index) * site.multiplier)
            self.deltas[index] = self.deltas[index] + self.change(index, residuals, keys)

    def _key_and_state(self, fact: Fact, index: int) -> tuple[Tensor, Tensor]:
        """Return a fact's mean key (d_ff,) at a site, and the state (d,) behind the last site, at the subject's end."""
        model, kept = self.bench.loaded.model, []
        module = self.sites[index].watched(model)
        with hooked(module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))):
            top = capture(model, self.sites[-1], fact.batch, above=False)
        rows = torch.arange(fact.prompts, device=fact.columns.device)
        return kept[0][rows, fact.columns[: fact.prompts]].float().mean(0), top.hidden[0, fact.columns[0]].float()


def _added(part: Part, change: Tensor) -> Tensor:
    hidden = part.activations.hidden
    every = change.to(hidden.dtype).expand(len(part.rows), -1)
    return hidden.index_put((part.rows, part.columns), every, accumulate=True)


def spread(residuals: Tensor, keys: Tensor, factor: Tensor) -> Tensor:
    """Return ``Rᵀ K (λ C + Kᵀ K)⁻¹`` (d, d_ff) in float32 for residuals (n, d) and keys (n, d_ff).

    As ``Rᵀ (I + K A Kᵀ)⁻¹ K A`` with ``A = (λ C)⁻¹``, which is the same and needs an inverse of the edits' size only.

    Args:
        factor: Cholesky factor of ``λ C`` (d_ff, d_ff), in float64.
    """
    wide = keys.double()
    turned = torch.cholesky_solve(wide.T, factor)
    inner = wide @ turned
    inner.diagonal().add_(1)
    delta: Tensor = residuals.double().T @ torch.linalg.solve(inner, turned.T)
    return delta.float()


METHODS.add("memit", partial(Memit, batch=1))
METHODS.add("memit-mass", Memit)
AT_ONCE.add("memit-mass")
