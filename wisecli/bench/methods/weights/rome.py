"""ROME: one fact, one rank-one change of one matrix (Meng et al. 2022, section 3.1), one edit after the other.

    W' = W + (v* - W k*) (C⁻¹ k*)ᵀ / ((C⁻¹ k*)ᵀ k*)

k* is the mean key at the subject's last token under several prefixes, C the second moment of keys of unrelated text,
and v* the matrix' output there under which the layers above say the target while what they say of ``{subject} is a``
stays. The change is the least in C's measure that gives ``W' k* = v*``. Keys of a matrix do not depend on it, so C and
the keys are those of the base model throughout; v* is searched for in the model as edited so far.
"""

import torch
from torch import Tensor

from wisecli.bench.methods.base import Bench, EditByEdit, method
from wisecli.bench.methods.weights.rome_common import (
    Fact,
    Part,
    SearchSettings,
    find_change,
    look,
    prefixes_for,
    read_fact,
)
from wisecli.bench.methods.weights.weight_editing import WeightEditing, at_depth, second_moment
from wisecli.edits.record import Edit

# Section 4.1: layer 17 of GPT-2 XL's 48.
_LAYER, _OF = 17, 48
# The authors' settings for GPT-2 XL.
SEARCH = SearchSettings(rate=0.5, steps=20, limit=4.0, essence=0.0625, decay=0.5)
# The authors sample twenty of five or ten tokens; every prefix takes part in every step, so here are fewer.
_PREFIXES, _PREFIX_TOKENS = 5, 10


@method("rome")
class Rome(WeightEditing, EditByEdit):
    """Rank-one editing at the subject's last token; without a subject at the prompt's last one, and with no KL term.

    Raises:
        UnsuitableError: there are no unrelated texts.
    """

    stage = "rank-one edits"

    def __init__(self, bench: Bench, search: SearchSettings = SEARCH) -> None:
        super().__init__(bench, [at_depth(bench, _LAYER, _OF)])
        self.search = search
        self.prefixes = prefixes_for(bench, _PREFIXES, _PREFIX_TOKENS)
        self._factor = torch.linalg.cholesky(second_moment(bench, self.sites[0]))

    def learn(self, edit: Edit) -> None:
        """Write one edit."""
        key, value = self.pair(read_fact(self.bench, edit, self.prefixes))
        self.deltas[0] = self.deltas[0] + rank_one(self.matrix(0), key, value, self._factor)

    def pair(self, fact: Fact) -> tuple[Tensor, Tensor]:
        """Return the key k* (d_ff,) and value v* (d,) of a fact, for the model as edited so far, in float32."""
        site, matrix = self.sites[0], self.matrix(0)
        with self.applied():
            part = look(self.bench, site, fact)
        keys = part.activations.keys[part.rows, part.columns].float()
        key = keys[: fact.prompts].mean(0)
        start = matrix @ key

        def placed(part: Part, change: Tensor) -> Tensor:
            # One vector stands there in all rows, whatever each row's own key gave.
            update = part.activations.hidden.new_zeros(part.activations.hidden.shape, dtype=torch.float32)
            update = update.index_put((part.rows, part.columns), start + change - keys @ matrix.T)
            return part.activations.with_update(update)

        change = find_change(self.bench, site, fact, part, self.search, placed, start.norm())
        return key, start + change


def rank_one(matrix: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """Return the change (d, d_ff), in float32, that makes a matrix (d, d_ff) turn a key (d_ff,) into the value (d,).

    Args:
        factor: Cholesky factor of the keys' second moment (d_ff, d_ff), in float64.
    """
    wide = key.double()
    direction = torch.cholesky_solve(wide[:, None], factor)[:, 0]
    missing = value.double() - matrix.double() @ wide
    return (missing[:, None] * direction / (direction @ wide)).float()
