"""Finds subjects that prompts misspell. Needs torch only; exports carry this very file.

A misspelt name is written with other tokens than the name, but with nearly the same letters. So a prompt that means an
edit also names its subject if it has every word of the name, each as it is or with one slip: one letter more, fewer or
another, or two neighbours that changed places (Damerau's four errors). A word of four letters may only have a letter
typed twice, or two neighbours that changed places: with the other slips it would often be another name. Shorter words
and words with digits must be as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.late_interaction import marked_to_front
from wisecli.routing.deciding.subject_match import SPAN_MARGIN, SPAN_PER_WORD, within_span

# Tensors that say how subjects are spelt.
FUZZY_MATCH = tuple(
    f"fuzzy_match.{part}" for part in ("token_characters", "subject_words", "entry_to_word", "entry_to_edit")
)
# Of so many letters of a token and of a word is kept account; a word's further ones are never looked at.
TOKEN_CHARS, WORD_CHARS = 20, 24
# Letters are numbers: nothing, what parts words, ten digits, and from there on letters.
SEPARATOR, DIGIT, LETTER = 1, 2, 12
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
        pair, place = (edits[:, None] == self.entry_to_edit).nonzero(as_tuple=True)
        words = torch.bincount(pair, minlength=len(edits))
        spans = SPAN_PER_WORD * words[pair] + SPAN_MARGIN
        near = equal_up_to_typo(self.subject_words[self.entry_to_word[place], None], prompt_words[rows[pair]])
        found = torch.zeros(len(edits), near.shape[1], dtype=torch.long, device=near.device)
        found = found.index_add(0, pair, within_span(near, spans).long())
        return (words > 0) & (found == words[:, None]).any(1)

    def characters(self, ids: Tensor, compared: Tensor) -> Tensor:
        """Return the letters of those of the tokens (B, T) that are looked at (B, T): (B, W, c)."""
        return token_characters(self.token_characters, ids, compared)


def token_characters(table: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """Return the letters of chosen (B, T) tokens (B, T), with marks between words: (B, W, c), zeros behind.

    Args:
        table: letters (v, ``TOKEN_CHARS``) of every token; what is not in it parts words.
    """
    known = chosen & (ids >= 0) & (ids < len(table))
    order, there = marked_to_front(chosen)
    # A pass may end within a word, so what lies beyond its first and last column parts nothing.
    edges = F.pad(~chosen[:, :-1], (1, 0)), F.pad(~chosen[:, 1:], (0, 1))
    before, after = ((edge.gather(1, order) * SEPARATOR).to(table.dtype)[..., None] for edge in edges)
    letters = table[ids.where(known, 0).gather(1, order)]
    letters = letters.where(known.gather(1, order)[..., None], SEPARATOR)
    found = torch.cat([before, letters, after], -1) * there[..., None]
    # What is passed over whole stands between words none the less.
    found[:, 0, 0].masked_fill_(~there[:, 0], SEPARATOR)
    return found


def split_words(letters: Tensor) -> Tensor:
    """Return the words that rows of letters (B, W, c) make up: (B, n, ``WORD_CHARS``), zeros behind."""
    stream = letters.flatten(1)
    order, there = marked_to_front(stream > 0)
    stream = stream.gather(1, order) * there
    letter = stream > SEPARATOR
    first = letter & ~F.pad(letter[:, :-1], (1, 0))
    column = torch.arange(stream.shape[1], device=stream.device)
    place = column - torch.where(first, column, 0).cummax(1).values
    count = max(1, int(first.sum(1).max()))
    within = letter & (place < WORD_CHARS)
    index = ((first.long().cumsum(1) - 1) * WORD_CHARS + place).where(within, count * WORD_CHARS)
    words = stream.new_zeros(len(stream), count * WORD_CHARS + 1).scatter(1, index, stream * within)
    return words[:, :-1].reshape(len(stream), count, WORD_CHARS)


def equal_up_to_typo(subject_word: Tensor, prompt_word: Tensor) -> Tensor:
    """Return whether words are the same but for one slip at most: (..., c) twice → (...)."""
    subject_word, prompt_word = torch.broadcast_tensors(subject_word, prompt_word)
    same = (subject_word == prompt_word).all(-1)
    subject_length, prompt_length = _length(subject_word), _length(prompt_word)
    common_prefix = _common_prefix_length(subject_word, prompt_word)
    common = common_prefix + _common_prefix_length(
        _reversed(subject_word, subject_length), _reversed(prompt_word, prompt_length)
    )
    longer = subject_length.maximum(prompt_length)
    # Where the words first differ, with the letter after that, and with the one before.
    first = common_prefix.clamp(max=subject_word.shape[-1] - 2)[..., None]
    pair, before = first + torch.arange(2, device=first.device), first + torch.tensor([0, -1], device=first.device)
    swapped = (subject_word.gather(-1, pair) == prompt_word.gather(-1, pair).flip(-1)).all(-1)
    swapped &= (common >= longer - 2) & (subject_length == prompt_length)
    one_letter = (common >= longer - 1) & ((subject_length - prompt_length).abs() <= 1)
    repeated = prompt_word.gather(-1, before.clamp(min=0)).diff(dim=-1)[..., 0] == 0
    twice = one_letter & repeated & (prompt_length > subject_length) & (common_prefix > 0)
    slip = (one_letter | swapped) & (subject_length >= MIN_ANY_SLIP)
    slip |= (twice | swapped) & (subject_length >= MIN_FUZZY_LENGTH)
    return same | (slip & ~_digits(subject_word) & ~_digits(prompt_word))


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


def _digits(words: Tensor) -> Tensor:
    return ((words >= DIGIT) & (words < LETTER)).any(-1)
