"""The parts of a memory that a later merge of the same edits and further ones need not compute again."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class EditProbs(NamedTuple):
    """The probability that each kept prompt means its edit, ``own`` (g,), and the highest of other edits' prompts,
    ``other`` (M,).

    ``possible`` (c,) are the kept prompts that unrelated texts were compared with, if those were not all.
    """

    own: Tensor
    other: Tensor
    possible: Tensor | None = None


class FormerMemory(NamedTuple):
    """The tensors of a lookup, the probabilities of its edits, and of how many directories of shards it was made."""

    tensors: Mapping[str, Tensor]
    probs: EditProbs
    directories: int

    @property
    def edits(self) -> int:
        """How many edits there are."""
        return len(self.probs.other)

    @property
    def prompts(self) -> int:
        """How many prompts are kept."""
        return len(self.probs.own)

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return len(self.tensors["key_to_edit"])
