"""Which edits prompts may ask by their question words. Needs torch only; exports carry this very file.

"When was it founded?" has nearly all words of "Who founded it?" and never asks that. So where a sentence that names an
edit's subject has question words, one of them must be of a sort by which the edit is asked. Sentences that end as
statements do not ask, and what has no question word may ask anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.fuzzy_match import FuzzyMatch
from wisecli.routing.deciding.late_interaction import marked_to_front
from wisecli.routing.deciding.prompt_words import split_with_tokens, word_hashes, written_words
from wisecli.routing.gating.sentence_features import SENTENCE_END, sentence_of

# The tensor that says by which sorts of questions each edit is asked: of each sort a bit, in the order of the columns
# that :func:`question_sorts` returns. The last one is what may ask anything.
ASKED_BY = "question_words.asked_by"
PERSON, NUMBER, PLACE, REASON, ANYTHING = range(5)
_SORT_COUNT = 5
# Pairs of a row and an edit that are compared at a time.
_AT_A_TIME = 256
# What asks for each sort by itself; behind "how"; and behind "what" or "which", which otherwise may ask anything.
_ALONE = {
    **{PERSON: written_words("who whom whose"), NUMBER: written_words("when")},
    **{PLACE: written_words("where"), REASON: written_words("why"), ANYTHING: written_words("name")},
}
_WHAT, _HOW = written_words("what which"), written_words("how")
_BEHIND_HOW = written_words(
    "many much long old large big far high tall wide deep fast often heavy hot cold late early soon"
)
_BEHIND_WHAT = {
    PERSON: written_words("person man woman people"),
    NUMBER: written_words("year years date month day century decade age number percentage amount"),
    PLACE: written_words("city town village country county state province region district continent place location"),
}


class _Words(NamedTuple):
    """The words of prompts: their ``letters`` (B, n, c), the ``sorts`` of questions that they begin (B, n, s), the
    number of each word's ``sentence`` (B, n), and whether that may ask something, ``asks`` (B, n).
    """

    letters: Tensor
    sorts: Tensor
    sentence: Tensor
    asks: Tensor

    @classmethod
    def of(cls, letters: Tensor, ends: Tensor, chosen: Tensor) -> _Words:
        """Return the words of chosen (B, T) tokens, whose letters are (B, W, c); ``ends`` (B, T) is what each ends."""
        words, token = split_with_tokens(letters)
        order, there = marked_to_front(chosen)
        ends = ends.gather(1, order) * there
        sentence = sentence_of(ends, torch.zeros_like(there))
        ended = torch.zeros_like(sentence).scatter_reduce(1, sentence, ends, "amax")
        of_word = sentence.gather(1, token)
        return cls(words, question_sorts(word_hashes(words)), of_word, ended.gather(1, of_word) != SENTENCE_END)


class QuestionWords(nn.Module):
    """The sorts of questions that ask edits.

    Args:
        tensors: with ``ASKED_BY`` (M,), which becomes a buffer.
    """

    asked_by: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("asked_by", tensors[ASKED_BY])

    def forward(self, spelling: FuzzyMatch, ids: Tensor, ends: Tensor, chosen: Tensor, wanted: Tensor) -> Tensor:
        """Return which of the wanted edits (B, M) prompts may ask by their question words; True for the others.

        Args:
            ids, ends, chosen: tokens, what each of them ends, and which are looked at (B, T).
        """
        fits = torch.ones_like(wanted)
        rows, edits = wanted.nonzero(as_tuple=True)
        if not len(rows):
            return fits
        used, place = rows.unique(return_inverse=True)
        words = _Words.of(spelling.characters(ids[used], chosen[used]), ends[used], chosen[used])
        for some in torch.arange(len(rows), device=rows.device).split(_AT_A_TIME):
            here = _Words(*(part[place[some]] for part in words))
            fits[rows[some], edits[some]] = self._fits(spelling, here, edits[some])
        return fits

    def _fits(self, spelling: FuzzyMatch, words: _Words, edits: Tensor) -> Tensor:
        """Return whether each prompt may ask an edit: words of P prompts, edits (P,) → (P,)."""
        near, pair = spelling.words_near(words.letters, edits)
        own = near.new_zeros(words.sentence.shape, dtype=torch.long).index_add(0, pair, near.long()) > 0
        # Which words of a subject each sentence has, and how many; there may be more sentences than words.
        sentences = int(words.sentence.max()) + 1
        found = near.new_zeros(len(near), sentences, dtype=torch.long)
        found = found.scatter_reduce(1, words.sentence[pair], near.long(), "amax")
        count = found.new_zeros(len(edits), sentences).index_add(0, pair, found)
        wanted = torch.bincount(pair, minlength=len(edits))[:, None]
        named = ((count == wanted) & (wanted > 0)).gather(1, words.sentence)
        asks = words.sorts & (named & words.asks & ~own)[..., None]
        asked_by = (self.asked_by[edits, None].long() >> torch.arange(_SORT_COUNT, device=edits.device)) % 2 > 0
        found_sorts = asks.any(1)
        return ~found_sorts.any(1) | (found_sorts & asked_by).any(1)


def question_sorts(hashes: Tensor) -> Tensor:
    """Return which sorts of questions each word begins, by the numbers of words one behind the other: (..., n) →
    (..., n, s).
    """
    behind = F.pad(hashes[..., 1:], (0, 1))
    what, how = (torch.isin(hashes, words.to(hashes.device)) for words in (_WHAT, _HOW))
    sorts = [torch.isin(hashes, _ALONE[sort].to(hashes.device)) for sort in range(_SORT_COUNT)]
    sorts[NUMBER] = sorts[NUMBER] | how & torch.isin(behind, _BEHIND_HOW.to(hashes.device))
    for sort, words in _BEHIND_WHAT.items():
        asked = what & torch.isin(behind, words.to(hashes.device))
        sorts[sort], what = sorts[sort] | asked, what & ~asked
    sorts[ANYTHING] = sorts[ANYTHING] | what
    return torch.stack(sorts, -1)
