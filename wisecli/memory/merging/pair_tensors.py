"""The tensors by which edits of a lookup answer one after the other, gathered from the evidence of all shards."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wisecli.artifacts.shard import Evidence


class PairTensors:
    """What edits need to answer in pairs; see :class:`~wisecli.routing.memories.answer_pairs.AnswerPairs`.

    Args:
        separator_token_id: the token between two answers.
        edits: how many edits there are, M.
    """

    def __init__(self, separator_token_id: int, edits: int) -> None:
        self.separator_token_id = separator_token_id
        self.separators, self.begins = (torch.zeros(edits, dtype=torch.long) for _ in range(2))
        self.usable = torch.zeros(edits, dtype=torch.uint8)
        self.ends: list[Tensor] = []

    def add_former(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a memory of the first edits."""
        first = slice(len(tensors["pairs.usable"]))
        self.separators[first], self.begins[first] = tensors["pairs.separators"], tensors["pairs.begins"]
        self.usable[first] = tensors["pairs.usable"]
        self.ends.append(tensors["pairs.ends"].nonzero().flatten())

    def add_answers(self, evidence: Evidence, edit: Tensor, residual: Tensor) -> None:
        """Note where answers begin and end.

        Args:
            evidence: keys of a shard (n,).
            edit: the edit of each among those of all shards (n,).
            residual: the residual that each adds (n,).
        """
        bare = (evidence.context == 0) & ~evidence.chat & (evidence.position == 0)
        self.begins[edit[bare]] = residual[bare]
        own = evidence.from_own_prompts
        answer, position = evidence.answer, evidence.position.long()
        last = torch.zeros(int(answer.max()) + 1, dtype=torch.long)
        last = last.scatter_reduce(0, answer[own], position[own], "amax")
        self.ends.append(residual[own & (position > 0) & (position == last[answer])].unique())

    def add_separators(self, edit: Tensor, residual: Tensor) -> None:
        """Note the residual that puts a separator after the answers of some edits: two (e,)."""
        self.separators[edit], self.usable[edit] = residual, 1

    def tensors(self, residuals: int) -> dict[str, Tensor]:
        """Return the pairs' tensors of a memory with ``residuals`` residuals; none if no edit answers in pairs."""
        if not self.usable.any():
            return {}
        ends = torch.zeros(residuals, dtype=torch.uint8)
        ends[torch.cat(self.ends)] = 1
        return {
            "pairs.separator_token_id": torch.tensor([self.separator_token_id]),
            "pairs.separators": self.separators,
            "pairs.begins": self.begins,
            "pairs.ends": ends,
            "pairs.usable": self.usable,
        }
