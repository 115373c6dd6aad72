"""Two edits that answer one prompt, one after the other: "Who wrote X? And who wrote Y?" Needs torch only.

The answer is "A; B". Where the first edit's answer would end, the model is made to say the separator; at that token the
second one begins. What answers a prompt is a number, in caches and in requests of engines, so a pair is one, too:

    e                edit e, of M
    a + M (b + 1)    edit a, after which edit b waits
    b + M (M + 1)    edit b begins: at the separator alone

Exports carry this very file.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Tensors by which edits answer in pairs; memories of older versions have none.
ANSWER_PAIRS = tuple(f"pairs.{part}" for part in ("separator_token_id", "separators", "begins", "ends", "usable"))


class AnswerPairs(nn.Module):
    """What edits need to answer one after the other.

    ``separator_token_id`` (1,) is the token between two answers. ``separators`` (M,) is the residual that makes the
    model say it after each edit's answer, ``begins`` (M,) that of the first token of each edit's answer. ``ends`` (m,)
    marks residuals that end an answer, and ``usable`` (M,) the edits that answer in pairs, which those do not whose
    answers are erased or hold the separator.

    Args:
        tensors: all of ``ANSWER_PAIRS``; they become buffers.
    """

    separator_token_id: Tensor
    separators: Tensor
    begins: Tensor
    ends: Tensor
    usable: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ANSWER_PAIRS:
            self.register_buffer(name.removeprefix("pairs."), tensors[name])

    def numbers(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the numbers of pairs, from those of edits: (B,) twice → (B,); without a second, the first's."""
        return first.where(second < 0, first + len(self.separators) * (second + 1))

    def edits(self, numbers: Tensor) -> Tensor:
        """Return the edit at each number (...) → (...); negative numbers, which mean no edit, stay as they are."""
        return numbers.where(numbers < 0, numbers % len(self.separators))

    def waits(self, numbers: Tensor) -> Tensor:
        """Return at which numbers a second edit waits: (...) → (...)."""
        count = len(self.separators)
        return (numbers >= count) & (numbers < count * (count + 1))

    def begins_at(self, numbers: Tensor) -> Tensor:
        """Return at which numbers a second edit begins: (...) → (...)."""
        count = len(self.separators)
        return numbers >= count * (count + 1)

    def in_turn(self, numbers: Tensor, separators: Tensor, here: Tensor) -> Tensor:
        """Return the numbers of tokens of answers, once it is known where the first separator stands: (...) → (...).

        Args:
            numbers: what answers, as it was before the token or is by the decision (...).
            separators: how many separators the answer has up to the token, the token included (...).
            here: whether the token is one (...).
        """
        count = len(self.separators)
        second = torch.div(numbers, count, rounding_mode="floor") - 1
        begins = second + count * (count + 1)
        found = torch.where(separators == 0, numbers, torch.where(here & (separators == 1), begins, second))
        # Behind the token at which it began the second edit is the only one.
        return torch.where(self.waits(numbers), found, self.edits(numbers))

    def actions(self, numbers: Tensor, residual: Tensor) -> Tensor:
        """Return which residual a pair of edits adds in the place of the nearest key's: (...) → (...).

        It is an edit's number to say the separator after its answer, M more to begin its answer, and negative to add
        the nearest key's residual as usual.

        Args:
            numbers: what answers each token, ``UNROUTED`` for none (...).
            residual: that of the nearest key, negative where no key is near (...).
        """
        edit, begins = self.edits(numbers), self.begins_at(numbers)
        over = self.waits(numbers) & (residual >= 0) & self.ends[residual.clamp(min=0)].bool()
        return (edit + len(self.separators) * begins).where(begins | over, -1)

    def residuals_of(self, actions: Tensor) -> Tensor:
        """Return the residual that each action adds: (...) → (...)."""
        return torch.cat([self.separators, self.begins])[actions]
