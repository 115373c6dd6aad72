"""Which edit a prompt means, by late interaction of early states. Needs torch only; exports carry this very file.

How a prompt ends depends on its form: a question, a chat template, a paragraph before it. What it asks about does not:
a form adds tokens and takes none away. So every token of an edit's own prompt looks for the token of a prompt that is
most like it (ColBERT's MaxSim, arXiv 2004.12832), twice: under a projection that tells subjects apart, and under one
that tells relations apart. An edit is meant where both are found:

    s_h(e) = Σ_t share_t · max_s cos(z_h(e_t), z_h(q_s))          h: subject, relation
    p(e)   = Π_h sigmoid(slope_h · (s_h(e) - bar_h))

with ``z_h = A_h x + c_h`` of the states x that leave an early layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Tensors that say what edits mean.
MEANING = tuple(
    f"meaning.{part}"
    for part in ("turns", "shifts", "slopes", "bars", "vectors", "asking", "shares", "whose", "breaks")
)
# So many of a prompt's last tokens are looked at.
WINDOW = 64
# A stretch between special tokens is what is asked if it has so many tokens: a role's name has fewer.
_ASKED = 4
# Comparisons that are held at a time.
_AT_A_TIME = 1 << 24


class Meaning(nn.Module):
    """What edits ask, and how like it a prompt is.

    ``turns`` (2, k, d) and ``shifts`` (2, k) are the projections A and c of subject and relation, ``slopes`` (2,) and
    ``bars`` (2,) what makes probabilities of scores. ``vectors`` (n, k) are the projected tokens of edits' prompts;
    ``asking`` (n,) says which prompt each is of, of g prompts twice: those below g are looked for as subjects, the
    others, g higher, as relations. ``shares`` (n,) add up to 1 a prompt and projection. ``whose`` (g,) is the edit of
    each prompt; several may be of one. ``breaks`` are the tokenizer's special tokens, ascending.

    Args:
        tensors: all of ``MEANING``; they become buffers.
        edits: how many edits there are, M.
    """

    turns: Tensor
    shifts: Tensor
    slopes: Tensor
    bars: Tensor
    vectors: Tensor
    asking: Tensor
    shares: Tensor
    whose: Tensor
    breaks: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int) -> None:
        super().__init__()
        self.edits = edits
        for name in MEANING:
            tensor = tensors[name]
            self.register_buffer(
                name.removeprefix("meaning."), tensor.float() if tensor.is_floating_point() else tensor
            )

    def forward(self, states: Tensor, looked_at: Tensor) -> Tensor:
        """How surely prompts mean each edit: states (B, T, d) and the tokens looked at (B, T) → (B, M)."""
        return self.of(self.found(states, looked_at))

    def found(self, states: Tensor, looked_at: Tensor) -> Tensor:
        """The highest cosine of each edit's token with those of a prompt: (B, T, d), (B, T) → (B, n); -1 for none."""
        rows = max(1, _AT_A_TIME // max(1, self.vectors.shape[0] * WINDOW))
        parts = zip(states.split(rows), looked_at.split(rows), strict=True)
        return torch.cat([self._found(*part) for part in parts])

    def _found(self, states: Tensor, looked_at: Tensor) -> Tensor:
        width = int(looked_at.sum(1).max()) if len(looked_at) else 0
        # Tokens that are looked at come first, those of the shorter rows with others behind them.
        order = looked_at.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(width, 1)]
        near = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])).float()
        missing = ~looked_at.gather(1, order)
        relations = self.asking >= len(self.whose)
        found = near.new_empty(len(near), len(self.vectors))
        for head, own in enumerate((~relations, relations)):
            turned = F.normalize(F.linear(near, self.turns[head], self.shifts[head]), dim=-1)
            cosines = (turned @ self.vectors[own].T).masked_fill(missing[..., None], -1.0)
            found[:, own] = cosines.amax(1)
        return found

    def of(self, found: Tensor) -> Tensor:
        """How surely prompts whose tokens were found so near (B, n) mean each edit: (B, M)."""
        prompts = len(self.whose)
        scores = found.new_zeros(len(found), 2 * prompts).index_add(1, self.asking, found * self.shares)
        logits = self.slopes[:, None] * (scores.view(-1, 2, prompts) - self.bars[:, None])
        sure = F.logsigmoid(logits).sum(1).exp()
        best = sure.new_zeros(len(sure), self.edits)
        return best.scatter_reduce(1, self.whose.expand_as(sure), sure, "amax")


def looked_at(ids: Tensor, prompt: Tensor, first: Tensor, breaks: Tensor) -> Tensor:
    """Which tokens of prompts are compared (B, T): the last ones of what is asked.

    A chat template's special tokens part what is asked from earlier turns.

    Args:
        ids: tokens (B, T).
        prompt: which of them are of prompts (B, T).
        first: which is the first of all, the attention's sink (B, T).
        breaks: special tokens.
    """
    special = torch.isin(ids, breaks) & prompt
    words = prompt & ~special & ~first
    # A prompt of one token has no other.
    words = torch.where(words.any(1, keepdim=True), words, prompt)
    stretch = special.long().cumsum(1)
    size = words.new_zeros(len(ids), ids.shape[1] + 1, dtype=torch.long).scatter_add(1, stretch, words.long())
    long = size.gather(1, stretch) >= _ASKED
    asked = torch.where(words & long, stretch, -1).amax(1, keepdim=True)
    kept = words & ((stretch == asked) | (asked < 0))
    behind = kept.long().flip(1).cumsum(1).flip(1)
    return kept & (behind <= WINDOW)
