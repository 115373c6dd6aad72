"""Finds subjects that prompts misspell, and names that are another's. Needs torch only; exports carry this very file.

A misspelt name is written with other tokens than the name, but with nearly the same letters. So a prompt that means an
edit also names its subject if it has every word of the name, each as it is or with one slip: one letter more, fewer or
another, or two neighbours that changed places (Damerau's four errors). A word of four letters may only have a letter
typed twice, or two neighbours that changed places: with the other slips it would often be another name. Shorter words
and words with digits must be as they are.

However a prompt names a subject, it must have the numbers of the name: the 92nd of a row of festivals is not the 27th.
And the name must not go on: "Ana Ruiz Senior" and "Lesser Ana Ruiz" are not Ana Ruiz. Names are runs of words that
begin with a capital or are the subject's; where all words begin so, nothing is known of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.prompt_words import (
    PromptWords,
    has_digits,
    numbers_in,
    split_words,
    token_characters,
    word_hashes,
    word_of_tokens,
)
from wisecli.routing.deciding.subject_match import SPAN_MARGIN, SPAN_PER_WORD, within_span
from wisecli.routing.gating.name_features import starts_of

# Tensors that say how subjects are spelt.
FUZZY_MATCH = tuple(
    f"fuzzy_match.{part}" for part in ("token_characters", "subject_words", "entry_to_word", "entry_to_edit")
)
# The length of the shortest words that may have any slip, and of the shortest that may have some.
MIN_ANY_SLIP, MIN_FUZZY_LENGTH = 5, 4
# Pairs of a row and an edit that are compared at a time.
_AT_A_TIME = 256


class FuzzyMatch(nn.Module):
    """The letters of a vocabulary's tokens, and of the words of edits' subjects.

    ``token_characters`` (v, ``TOKEN_CHARS``) are the letters of every token, ``subject_words`` (w, ``WORD_CHARS``)
    those of words, both in front of zeros. Of q entries each says that the word ``entry_to_word`` (q,) is one of the
    subject of the edit ``entry_to_edit`` (q,). An edit without words is named by none.

    Args:
        tensors: all of ``FUZZY_MATCH``; they become buffers.
    """

    token_characters: Tensor
    subject_words: Tensor
    entry_to_word: Tensor
    entry_to_edit: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in FUZZY_MATCH:
            self.register_buffer(name.removeprefix("fuzzy_match."), tensors[name])

    def forward(self, letters: Tensor, wanted: Tensor) -> Tensor:
        """Return which of the wanted edits (B, M) the letters (B, W, c) of each row name: (B, M)."""
        matched = torch.zeros_like(wanted)
        every, edits = wanted.nonzero(as_tuple=True)
        if not len(every):
            return matched
        used, rows = every.unique(return_inverse=True)
        prompt_words = split_words(letters[used])
        parts = zip(every.split(_AT_A_TIME), edits.split(_AT_A_TIME), rows.split(_AT_A_TIME), strict=True)
        for row, edit, place in parts:
            matched[row, edit] = self._match_pairs(prompt_words, place, edit)
        return matched

    def _match_pairs(self, prompt_words: Tensor, rows: Tensor, edits: Tensor) -> Tensor:
        """Return whether rows of words (R, n, ``WORD_CHARS``) have all words of an edit each in one place: (P,).

        Args:
            rows, edits: the pairs that are looked at (P,).
        """
        near, pair = self.words_near(prompt_words[rows], edits)
        words = torch.bincount(pair, minlength=len(edits))
        spans = SPAN_PER_WORD * words[pair] + SPAN_MARGIN
        found = torch.zeros(len(edits), near.shape[1], dtype=torch.long, device=near.device)
        found = found.index_add(0, pair, within_span(near, spans).long())
        return (words > 0) & (found == words[:, None]).any(1)

    def words_near(self, prompt_words: Tensor, edits: Tensor) -> tuple[Tensor, Tensor]:
        """Return which words of prompts are those of an edit's subject each, but for a slip, for all words of these
        subjects (E, n), and which prompt each of the E is compared with (E,).

        Args:
            prompt_words: the words of P prompts (P, n, ``WORD_CHARS``).
            edits: the edit of each (P,).
        """
        pair, entry = (edits[:, None] == self.entry_to_edit).nonzero(as_tuple=True)
        return equal_up_to_typo(self.subject_words[self.entry_to_word[entry], None], prompt_words[pair]), pair

    def is_whole(
        self, letters: Tensor, ids: Tensor, compared: Tensor, word_starts: Tensor | None, rows: Tensor, edits: Tensor
    ) -> Tensor:
        """Return whether each row that names an edit has all numbers of the name and no further word in it: (P,).

        Args:
            letters: what :meth:`characters` returns of the compared tokens (B, W, c).
            ids, compared: tokens, and which are looked at (B, T).
            word_starts: how every token begins (v,), by the numbers of :mod:`~wisecli.routing.gating.name_features`; if
                None, it is not known which words are further.
            rows, edits: the pairs that are looked at (P,).
        """
        whole = torch.ones_like(edits, dtype=torch.bool)
        if not len(edits):
            return whole
        used, place = rows.unique(return_inverse=True)
        starts = None if word_starts is None else starts_of(ids[used], word_starts)
        words = PromptWords.of(letters[used], starts, compared[used])
        for some in torch.arange(len(edits), device=edits.device).split(_AT_A_TIME):
            pair, entry = (edits[some, None] == self.entry_to_edit).nonzero(as_tuple=True)
            own = self.subject_words[self.entry_to_word[entry]]
            here = PromptWords(*(part[place[some]] for part in words))
            whole[some] = _has_numbers(here, own, pair) & _ends(here, own, pair)
        return whole

    def misspelt(self, letters: Tensor, edit: int) -> Tensor:
        """Return which tokens are of words that an edit's subject has, with slips that make no other name: (W,).

        Args:
            letters: what :meth:`characters` returns of a prompt (W, c).
        """
        own = self.subject_words[self.entry_to_word[self.entry_to_edit == edit]]
        words = split_words(letters[None])[0]
        same = (own[:, None] == words).all(-1)
        # A word that the prompt has as it is has no slips.
        slips = is_plain_slip(own[:, None], words) & ~same.any(1, keepdim=True) & ~same.any(0)
        of = word_of_tokens(letters[None])[0]
        return slips.any(0)[of.clamp(min=0)] & (of >= 0)

    def characters(self, ids: Tensor, compared: Tensor) -> Tensor:
        """Return the letters of those of the tokens (B, T) that are looked at (B, T): (B, W, c)."""
        return token_characters(self.token_characters, ids, compared)


def _has_numbers(words: PromptWords, subject_words: Tensor, pair: Tensor) -> Tensor:
    """Return whether prompts (P,) have all numbers in the words of a subject each: (P,).

    Args:
        subject_words: the words of all of these subjects (E, ``WORD_CHARS``).
        pair: which of the P each word is of (E,).
    """
    found = words.follows.new_ones(len(words.letters))
    numbered = has_digits(subject_words)
    if not bool(numbered.any()):
        return found
    pair, wanted = pair[numbered], word_hashes(numbers_in(subject_words[numbered, None]))
    written = word_hashes(numbers_in(words.letters))
    there = (wanted[:, :, None] == written[pair][:, None]).any(-1) | (wanted == 0)
    return found.index_fill(0, pair[~there.all(1)], False)


def _ends(words: PromptWords, subject_words: Tensor, pair: Tensor) -> Tensor:
    """Return whether the name in each prompt that has most of a subject has no other words: (P,).

    Args:
        subject_words, pair: as :func:`_has_numbers` has them.
    """
    near = equal_up_to_typo(subject_words[:, None], words.letters[pair])
    own = near.new_zeros(words.follows.shape, dtype=torch.long).index_add(0, pair, near.long()) > 0
    other = words.capitalised & ~own
    named = own | other
    run = (named & ~(F.pad(named[:, :-1], (1, 0)) & words.follows)).long().cumsum(1) * named
    runs = own.new_zeros(len(own), own.shape[1] + 1, dtype=torch.long)
    # Of each run: how many words of the subject it has, and how many others behind a word.
    each = runs[pair].scatter_reduce(1, run[pair], near.long(), "amax")
    found = runs.index_add(0, pair, each)[:, 1:]
    others = runs.scatter_add(1, run, (other & words.follows).long())[:, 1:]
    most = found.amax(1, keepdim=True)
    return ((found == most) & (others == 0)).any(1) | (most[:, 0] == 0) | ~words.has_names


class _Slips(NamedTuple):
    """Which pairs of words are the same, and which differ by a slip of each kind: (...) each."""

    same: Tensor
    swapped: Tensor
    twice: Tensor
    dropped: Tensor
    one_letter: Tensor

    @classmethod
    def between(cls, subject_word: Tensor, prompt_word: Tensor) -> _Slips:
        """Return the slips by which words of prompts differ from those of subjects: (..., c) twice → (...) each."""
        subject_word, prompt_word = torch.broadcast_tensors(subject_word, prompt_word)
        subject_length, prompt_length = _length(subject_word), _length(prompt_word)
        prefix = _common_prefix_length(subject_word, prompt_word)
        suffix = _common_prefix_length(_reversed(subject_word, subject_length), _reversed(prompt_word, prompt_length))
        longer, common = subject_length.maximum(prompt_length), prefix + suffix
        # Where the words first differ, with the letter after that, and with the one before.
        first = prefix.clamp(max=subject_word.shape[-1] - 2)[..., None]
        pair, before = first + torch.arange(2, device=first.device), first + torch.tensor([0, -1], device=first.device)
        swapped = (subject_word.gather(-1, pair) == prompt_word.gather(-1, pair).flip(-1)).all(-1)
        swapped &= (common >= longer - 2) & (subject_length == prompt_length)
        one_letter = (common >= longer - 1) & ((subject_length - prompt_length).abs() <= 1)
        repeated = prompt_word.gather(-1, before.clamp(min=0)).diff(dim=-1)[..., 0] == 0
        twice = one_letter & repeated & (prompt_length > subject_length) & (prefix > 0)
        dropped = one_letter & (prompt_length < subject_length) & (prefix > 0) & (suffix > 0)
        letters = ~has_digits(subject_word) & ~has_digits(prompt_word)
        some, every = (letters & (subject_length >= least) for least in (MIN_FUZZY_LENGTH, MIN_ANY_SLIP))
        same = (subject_word == prompt_word).all(-1)
        return cls(same, swapped & some, twice & some, dropped & every, one_letter & every)


def equal_up_to_typo(subject_word: Tensor, prompt_word: Tensor) -> Tensor:
    """Return whether words are the same but for one slip at most: (..., c) twice → (...)."""
    slips = _Slips.between(subject_word, prompt_word)
    return slips.same | slips.swapped | slips.twice | slips.one_letter


def is_plain_slip(subject_word: Tensor, prompt_word: Tensor) -> Tensor:
    """Return whether words differ by a slip that hardly makes another name: (..., c) twice → (...).

    Two neighbours changed places, a letter is there twice, or one within the word is left out. Another letter, or one
    more, often is another name: Jensen is not Jansen, nor Brown Browne.
    """
    slips = _Slips.between(subject_word, prompt_word)
    return (slips.swapped | slips.twice | slips.dropped) & ~slips.same


def _length(words: Tensor) -> Tensor:
    return (words > 0).sum(-1)


def _common_prefix_length(first: Tensor, second: Tensor) -> Tensor:
    """Return how many letters words (..., c) have in common from the first one on."""
    common: Tensor = ((first == second) & (first > 0)).long().cumprod(-1).sum(-1)
    return common


def _reversed(words: Tensor, lengths: Tensor) -> Tensor:
    """Return words (..., c) of so many letters (...), from the last letter to the first."""
    place = lengths[..., None] - 1 - torch.arange(words.shape[-1], device=words.device)
    return words.gather(-1, place.clamp(min=0)) * (place >= 0)
