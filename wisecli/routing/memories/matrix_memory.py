"""Changes of the matrix, opened by their norm as in WISE or by what prompts ask. Needs torch only; exports carry this.

score of a prompt    mean over its tokens of ‖Δ_m a‖₂    (WISE, arXiv 2405.14768, equation 3, as in the authors' code)
m answers            where the score exceeds ε_m; of several, the one that exceeds it most (section 2.3.2)
y = W a + b + Δ_m a
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.decision import AnswerTokens, Decision, TokenChoices, WindowStates
from wisecli.routing.deciding.fact_decision import FactDecision
from wisecli.routing.deciding.prompt_window import UNROUTED, last_marked
from wisecli.routing.memories.side_memory import Memory, SideMemory


class MatrixDeltas(Memory):
    """Changes of a matrix, one for all edits (WISE-Merge) or one a shard (WISE-Retrieve)."""

    kind = "matrix"

    columns: Tensor
    delta: Tensor

    def choices(self, keys: Tensor, answered: Tensor, tokens: AnswerTokens) -> TokenChoices:  # noqa: ARG002 (of the interface)
        """Return the memory that was decided, at all its tokens."""
        return TokenChoices(answered, torch.zeros(answered.shape, device=keys.device), answered)

    def add(self, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """Add ``Δ_m a`` to every token that memory m answers."""
        chosen, count = self.matrix_of(chosen), len(self.delta)
        # How many tokens are routed is not known to a traced graph; and one change costs less than finding them.
        if torch.compiler.is_compiling() or count == 1:
            for number in range(count):
                update = self.delta_output(keys, number).to(answer.dtype)
                answer = torch.where((chosen == number)[..., None], answer + update, answer)
            return answer
        for number in chosen.unique().tolist():
            if number != UNROUTED:
                routed = chosen == number
                update = self.delta_output(keys[routed], number).to(answer.dtype)
                answer = answer.index_put(routed.nonzero(as_tuple=True), update, accumulate=True)
        return answer

    def matrix_of(self, chosen: Tensor) -> Tensor:
        """Return the matrix that holds each memory, ``UNROUTED`` for none: (...) → (...)."""
        return chosen

    def delta_output(self, keys: Tensor, number: int) -> Tensor:
        """Return ``Δ a`` of one change: (..., d_ff) → (..., d)."""
        return F.linear(keys[..., self.columns[number]].to(self.delta.dtype), self.delta[number])


class FactMatrixMemory(FactDecision, MatrixDeltas):
    """Changes that hold edits which prompts ask."""

    edit_to_matrix: Tensor

    def matrix_of(self, chosen: Tensor) -> Tensor:
        """Return the matrix that holds each edit: (...) → (...)."""
        return self.edit_to_matrix.to(chosen.device)[chosen.clamp(min=0)].where(chosen != UNROUTED, UNROUTED)


class MatrixMemory(MatrixDeltas):
    """Changes that open by their own norm."""

    def __init__(self, memory: SideMemory) -> None:
        super().__init__(memory)
        self._pool = _POOLED[memory.pooling]
        self.answers_prompts = memory.pooling == "mean"

    def decide(self, window: WindowStates) -> Decision:
        """Return for each prompt the memory with the highest score of those above their thresholds.

        If it calls none beyond that, ``nearest`` is the one that comes nearest to it.
        """
        scores = self._pool(self.scores(window.states).float(), window.non_padding)
        factor, nearest = self.best_score_ratio(scores)
        ratios = scores / scores.new_tensor(self.thresholds)
        called = nearest.where(factor <= 1, scores.where(ratios > 1, -torch.inf).argmax(-1))
        score_ratio = ratios.gather(-1, called[:, None])[:, 0]
        opens = (score_ratio > 1) & window.non_padding.any(1)
        return Decision(called.where(opens, UNROUTED), score_ratio, called, scores)

    def scores(self, keys: Tensor) -> Tensor:
        """Return ``‖Δ_m a‖₂`` of every memory for every key: (..., d_ff) → (..., M)."""
        memories = range(len(self.thresholds))
        return torch.stack([torch.linalg.vector_norm(self.scored_output(keys, m), dim=-1) for m in memories], dim=-1)

    def scored_output(self, keys: Tensor, memory: int) -> Tensor:
        """Return ``Δ_m a``, which is scored, as the matrix' own output is not known here."""
        return self.delta_output(keys, memory)


def _mean(scores: Tensor, non_padding: Tensor) -> Tensor:
    """Return the mean of scores (B, W, M) over a prompt's tokens (B, M)."""
    return torch.einsum("btm,bt->bm", scores, non_padding / non_padding.sum(1, keepdim=True).clamp(min=1))


def _last(scores: Tensor, non_padding: Tensor) -> Tensor:
    """Return the scores (B, W, M) of a prompt's last token (B, M)."""
    end = last_marked(non_padding).clamp(min=0)
    return scores[torch.arange(len(end), device=end.device), end]


_POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "last": _last}
