"""Which edits' subjects prompts name. Needs torch only; exports carry this very file."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How much of a subject a prompt must hold, of its tokens, each by how rare it is in unrelated text: what prompts mean
# takes names for others that are like them.
MIN_SUBJECT_SHARE = 0.75
# A name has its words in one place: in so many tokens for each of its own, and so many more.
SPAN_PER_WORD, SPAN_MARGIN = 2, 4
# Tensors that say which tokens name the subject of which edit.
SUBJECT_MATCH = tuple(
    f"subject_match.{part}"
    for part in ("token_ids", "token_to_word", "name_to_edit", "entry_to_name", "entry_to_word", "word_weights")
)


class SubjectMatch(nn.Module):
    """The tokens that edits' subjects are written with.

    ``token_ids`` (v,), ascending, spell the words ``token_to_word`` (v,), below v; several tokens may spell one word,
    with a capital or a space before it. Each of g names is of the edit ``name_to_edit`` (g,); an edit may have several
    names, as a tokenizer splits capitals otherwise, and one without a name is named by every prompt. Of q entries each
    says that the name ``entry_to_name`` (q,) has the word ``entry_to_word`` (q,), which makes up ``word_weights`` (q,)
    of the name; they add up to 1 a name.

    Args:
        tensors: all of ``SUBJECT_MATCH``; they become buffers.
        edits: how many edits there are, M.
    """

    token_ids: Tensor
    token_to_word: Tensor
    name_to_edit: Tensor
    entry_to_name: Tensor
    entry_to_word: Tensor
    word_weights: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int) -> None:
        super().__init__()
        self.edits = edits
        for name in SUBJECT_MATCH:
            self.register_buffer(name.removeprefix("subject_match."), tensors[name])

    def forward(self, ids: Tensor, in_prompt: Tensor) -> Tensor:
        """Return which edits' subjects prompts name: token ids (B, T), which are of prompts (B, T) → (B, M)."""
        return self.matched_edits(self.words_in(ids, in_prompt))

    def in_one_place(self, ids: Tensor, in_prompt: Tensor, rows: Tensor, edits: Tensor) -> Tensor:
        """Return whether rows name an edit each by words that stand near each other: (P,).

        The words of "Two to One" are somewhere in any long text.

        Args:
            ids, in_prompt: as :meth:`forward` has them (B, T).
            rows, edits: the pairs that are looked at (P,).
        """
        pair, name = (edits[:, None] == self.name_to_edit).nonzero(as_tuple=True)
        own, entry = (name[:, None] == self.entry_to_name).nonzero(as_tuple=True)
        words = self._word_at(ids, in_prompt)
        sizes = torch.bincount(own, minlength=len(name))
        spans = SPAN_PER_WORD * sizes[own] + SPAN_MARGIN
        near = within_span(words[rows[pair[own]]] == self.entry_to_word[entry, None], spans)
        shares = near.new_zeros(len(name), ids.shape[1], dtype=torch.float32)
        shares = shares.index_add(0, own, near * self.word_weights[entry, None].float())
        found = shares.amax(1) > MIN_SUBJECT_SHARE - 1e-4
        named = torch.ones_like(edits, dtype=torch.int).index_fill(0, pair, 0)
        return named.index_add(0, pair, found.int()) > 0

    def words_in(self, ids: Tensor, in_prompt: Tensor) -> Tensor:
        """Return which words the tokens (B, T) spell that ``in_prompt`` (B, T) marks: 0 or 1, (B, v)."""
        words = self.word_weights.new_zeros(len(ids), len(self.token_ids) + 1, dtype=torch.float32)
        return words.scatter(1, self._word_at(ids, in_prompt), 1.0)[:, :-1]

    def _word_at(self, ids: Tensor, in_prompt: Tensor) -> Tensor:
        """Return the word that each token (B, T) spells, v where it spells none or is outside of the prompt (B, T)."""
        place = torch.searchsorted(self.token_ids, ids.contiguous()).clamp(max=len(self.token_ids) - 1)
        return self.token_to_word[place].where((self.token_ids[place] == ids) & in_prompt, len(self.token_ids))

    def matched_edits(self, words: Tensor) -> Tensor:
        """Return the edits whose subjects rows with these words (B, v) name: (B, M)."""
        share = words.new_zeros(len(words), len(self.name_to_edit))
        share = share.index_add(1, self.entry_to_name, words[:, self.entry_to_word] * self.word_weights.float())
        matched = words.new_ones(len(words), self.edits).index_fill(1, self.name_to_edit, 0.0)
        return matched.index_add(1, self.name_to_edit, (share > MIN_SUBJECT_SHARE - 1e-4).to(words.dtype)) > 0


def within_span(present: Tensor, spans: Tensor) -> Tensor:
    """Return whether something is present within a span (E,) from each place on: (E, T) → (E, T)."""
    count = F.pad(present.long().cumsum(1), (1, 0))
    end = torch.arange(present.shape[1], device=present.device) + spans[:, None]
    return count.gather(1, end.clamp(max=present.shape[1])) > count[:, :-1]
