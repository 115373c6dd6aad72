"""What a router reads and what it decides. Needs torch only; exports carry this very file."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wisecli.routing.deciding.prompt_window import UNROUTED


@dataclass(frozen=True)
class WindowStates:
    """What a model makes of windows of B prompts: ``ids`` and, where they are no padding, ``non_padding`` (B, W).

    ``states`` (B, W, d) are those that leave the layer that a memory reads first, or the inputs of the edited matrix
    (B, W, d_ff) for a memory that reads none.
    """

    ids: Tensor
    non_padding: Tensor
    states: Tensor


@dataclass(frozen=True)
class Decision:
    """Which memory answers each of B prompts, and why.

    ``memory`` (B,) is its number, ``UNROUTED`` for none. ``nearest`` (B,) is the memory that comes nearest to opening,
    ``score_ratio`` (B,) its score as a multiple of its threshold, ``scores`` (B, M) how strongly each is called. Of a
    lookup ``subject_matched`` (B, M) marks the edits whose subjects prompts name, ``question_fits`` (B, M) those that
    their question words may ask, and ``ask_prob`` (B,) is how surely they ask what they mean, 0 where they mean
    nothing; ``None`` where that has no say. ``second`` (B,) is the memory that answers behind that one where a prompt
    asks two things, ``UNROUTED`` where it does not.
    """

    memory: Tensor
    score_ratio: Tensor
    nearest: Tensor
    scores: Tensor
    subject_matched: Tensor | None = None
    question_fits: Tensor | None = None
    ask_prob: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True)
class AnswerTokens:
    """Tokens (...) by their ``ids``, and their ``place`` behind their prompts' last ones.

    That is 1 for an answer's first token, and 0 or less up to the prompt's end.
    """

    ids: Tensor
    place: Tensor

    @property
    def in_answer(self) -> Tensor:
        """Which tokens come after their prompt's last one (...)."""
        return self.place > 0

    def __getitem__(self, index: Any) -> "AnswerTokens":
        """Return some of the tokens, or the same in another shape."""
        return AnswerTokens(self.ids[index], self.place[index])


@dataclass(frozen=True)
class TokenChoices:
    """What answers tokens (...): ``chosen`` is a memory, or of a lookup one of its keys; ``UNROUTED`` where none does.

    ``score_ratio`` is the best score there as a multiple of its threshold, and ``nearest`` what has it.
    """

    chosen: Tensor
    score_ratio: Tensor
    nearest: Tensor


def with_rows_replaced(decision: Decision, rows: Tensor, replacements: Decision) -> Decision:
    """Return a decision with some rows replaced, where the replacements open an edit; none of these opens two."""
    if decision.second is not None:
        replacements = replace(replacements, second=torch.full_like(replacements.memory, UNROUTED))
    opened = replacements.memory != UNROUTED
    rows = rows[opened]
    parts: dict[str, Any] = {}
    for name in Decision.__dataclass_fields__:
        whole, part = getattr(decision, name), getattr(replacements, name)
        parts[name] = whole if whole is None or part is None else whole.index_copy(0, rows, part[opened])
    return Decision(**parts)
