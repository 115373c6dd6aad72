"""Changes of a matrix, that their own norm opens as in WISE, or what prompts ask. Needs torch only; exports carry this.

score of a prompt    mean over its tokens of ‖Δ_m a‖₂    (WISE, arXiv 2405.14768, equation 3, as in the authors' code)
m answers            where the score exceeds ε_m; of several, the one that exceeds it most (section 2.3.2)
y = W a + b + Δ_m a
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .decision import Decision, Reading, TokenChoices
from .fact_decision import FactDecision
from .prompts import UNROUTED, last_marked
from .scores import Memory, SideMemory


class Changes(Memory):
    """Changes of a matrix, one for all edits (WISE-Merge) or one a shard (WISE-Retrieve)."""

    kind = "matrix"

    columns: Tensor
    delta: Tensor

    def choices(self, keys: Tensor, answered: Tensor, inside: Tensor) -> TokenChoices:  # noqa: ARG002 (of the interface)
        """The memory that was decided for, at all its tokens."""
        return TokenChoices(answered, torch.zeros(answered.shape, device=keys.device), answered)

    def add(self, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """Add ``Δ_m a`` to every token that memory m answers."""
        chosen, count = self.change_of(chosen), len(self.delta)
        # How many tokens are routed is not known to a traced graph; and one change costs less than finding them.
        if torch.compiler.is_compiling() or count == 1:
            for number in range(count):
                update = self.update(keys, number).to(answer.dtype)
                answer = torch.where((chosen == number)[..., None], answer + update, answer)
            return answer
        for number in chosen.unique().tolist():
            if number != UNROUTED:
                routed = chosen == number
                update = self.update(keys[routed], number).to(answer.dtype)
                answer = answer.index_put(routed.nonzero(as_tuple=True), update, accumulate=True)
        return answer

    def residuals(self, keys: Tensor, memory: int, inside: Tensor) -> Tensor:  # noqa: ARG002 (of the interface)
        """``Δ_m a`` of keys."""
        return self.update(keys, int(self.change_of(torch.tensor(memory))))

    def change_of(self, chosen: Tensor) -> Tensor:
        """The change that answers for each memory (...), ``UNROUTED`` for none: (...)."""
        return chosen

    def update(self, keys: Tensor, number: int) -> Tensor:
        """``Δ a`` of one change: (..., d_ff) → (..., d)."""
        return F.linear(keys[..., self.columns[number]].to(self.delta.dtype), self.delta[number])


class FactChanges(FactDecision, Changes):
    """Changes that hold edits which prompts ask."""

    holder: Tensor

    def change_of(self, chosen: Tensor) -> Tensor:
        """The change that holds each edit (...): (...)."""
        return self.holder.to(chosen.device)[chosen.clamp(min=0)].where(chosen != UNROUTED, UNROUTED)


class MatrixMemory(Changes):
    """Changes that open by their own norm."""

    def __init__(self, memory: SideMemory) -> None:
        super().__init__(memory)
        self._pool = _POOLED[memory.pooling]
        self.answers_prompts = memory.pooling == "mean"

    def decide(self, reading: Reading) -> Decision:
        """The memory that a prompt calls most strongly of those that it calls beyond their thresholds.

        If it calls none beyond that, ``nearest`` is the one that comes nearest to it.
        """
        scores = self._pool(self.scores(reading.states).float(), reading.real)
        factor, nearest = self.strongest(scores)
        beyond = scores / scores.new_tensor(self.thresholds)
        called = nearest.where(factor <= 1, scores.where(beyond > 1, -torch.inf).argmax(-1))
        strength = beyond.gather(-1, called[:, None])[:, 0]
        opens = (strength > 1) & reading.real.any(1)
        return Decision(called.where(opens, UNROUTED), strength, called, scores)

    def scores(self, keys: Tensor) -> Tensor:
        """``‖Δ_m a‖₂`` of every memory for every key: (..., d_ff) → (..., M)."""
        memories = range(len(self.thresholds))
        return torch.stack([torch.linalg.vector_norm(self.change(keys, m), dim=-1) for m in memories], dim=-1)

    def change(self, keys: Tensor, memory: int) -> Tensor:
        """What is measured: ``Δ_m a``, as nothing is known here of what the matrix itself gives."""
        return self.update(keys, memory)


def _mean(scores: Tensor, real: Tensor) -> Tensor:
    """The mean of scores (B, W, M) over a prompt's tokens (B, M)."""
    return torch.einsum("btm,bt->bm", scores, real / real.sum(1, keepdim=True).clamp(min=1))


def _last(scores: Tensor, real: Tensor) -> Tensor:
    """The scores (B, W, M) of a prompt's last token (B, M)."""
    end = last_marked(real).clamp(min=0)
    return scores[torch.arange(len(end), device=end.device), end]


_POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "last": _last}
