"""Which edits' subjects prompts name. Needs torch only; exports carry this very file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# How much of a subject a prompt must hold, of its tokens, each by how rare it is in unrelated text: what prompts mean
# takes names for others that are like them.
MIN_SUBJECT_SHARE = 0.75
# Tensors that say which tokens name the subject of which edit.
SUBJECT_MATCH = tuple(f"names.{part}" for part in ("tokens", "words", "whose", "named", "naming", "shares"))


class SubjectMatch(nn.Module):
    """The tokens that edits' subjects are written with.

    ``tokens`` (v,) ascending, and the word that each spells, ``words`` (v,) below v; several tokens may spell one,
    with a capital or a space before it. Names (g,) are of the edits ``whose`` (g,); several may be of one, as a
    tokenizer splits capitals otherwise. An edit without a name is named by every prompt. Name ``named`` (q,) has the
    word ``naming`` (q,), as ``shares`` (q,) of the whole, which add up to 1 a name.

    Args:
        tensors: all of ``SUBJECT_MATCH``; they become buffers.
        edits: how many edits there are, M.
    """

    tokens: Tensor
    words: Tensor
    whose: Tensor
    named: Tensor
    naming: Tensor
    shares: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int) -> None:
        super().__init__()
        self.edits = edits
        for name in SUBJECT_MATCH:
            self.register_buffer(name.removeprefix("names."), tensors[name])

    def forward(self, ids: Tensor, in_prompt: Tensor) -> Tensor:
        """Which edits' subjects are named in rows: token ids (B, T), and which belong to prompts (B, T) → (B, M)."""
        return self.matched_edits(self.words_in(ids, in_prompt))

    def words_in(self, ids: Tensor, in_prompt: Tensor) -> Tensor:
        """Which words rows of token ids (B, T) hold, at the tokens that ``in_prompt`` (B, T) marks: 0 or 1, (B, v)."""
        place = torch.searchsorted(self.tokens, ids.contiguous()).clamp(max=len(self.tokens) - 1)
        known = (self.tokens[place] == ids) & in_prompt
        words = self.shares.new_zeros(len(ids), len(self.tokens) + 1, dtype=torch.float32)
        return words.scatter(1, self.words[place].where(known, len(self.tokens)), 1.0)[:, :-1]

    def matched_edits(self, words: Tensor) -> Tensor:
        """The edits whose subjects rows with these words (B, v) name: (B, M)."""
        share = words.new_zeros(len(words), len(self.whose))
        share = share.index_add(1, self.named, words[:, self.naming] * self.shares.float())
        named = words.new_ones(len(words), self.edits).index_fill(1, self.whose, 0.0)
        return named.index_add(1, self.whose, (share > MIN_SUBJECT_SHARE - 1e-4).to(words.dtype)) > 0
