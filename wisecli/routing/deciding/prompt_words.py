"""The words of prompts, by their letters. Needs torch only; exports carry this very file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.late_interaction import marked_to_front
from wisecli.routing.gating.name_features import CAPITAL, CAPITAL_WITHIN, MIN_SMALL_SHARE, NO_WORD

# Of so many letters of a token and of a word is kept account; a word's further ones are never looked at.
TOKEN_CHARS, WORD_CHARS = 20, 24
# Letters are numbers: nothing, what parts words, ten digits, and from there on letters.
SEPARATOR, DIGIT, LETTER = 1, 2, 12
# The numbers of words are polynomials in this.
_FACTOR = 1_000_003


class PromptWords(NamedTuple):
    """The words of prompts.

    ``letters`` (B, n, ``WORD_CHARS``) are zeros behind a row's last word. ``capitalised`` marks words that begin with a
    capital and may be of a name (B, n), ``follows`` those with nothing but a space between them and the word before
    (B, n), and ``has_names`` prompts in which capitals tell names (B,).
    """

    letters: Tensor
    capitalised: Tensor
    follows: Tensor
    has_names: Tensor

    @classmethod
    def of(cls, letters: Tensor, starts: Tensor | None, chosen: Tensor) -> PromptWords:
        """Return the words of chosen (B, T) tokens.

        Args:
            letters: the letters of these tokens, as :func:`token_characters` has them (B, W, c).
            starts: how each token begins (B, T), by the numbers of :mod:`~wisecli.routing.gating.name_features`, if it
                is known.
        """
        words, begins = split_with_tokens(letters)
        if starts is None:
            unknown = torch.zeros_like(begins, dtype=torch.bool)
            return cls(words, unknown, unknown, unknown.any(1))
        order, there = marked_to_front(chosen)
        starts = starts.gather(1, order).masked_fill(~there, NO_WORD)
        gap = (~F.pad(chosen[:, :-1], (1, 0))).gather(1, order)
        apart = ((starts == NO_WORD) | gap).long().cumsum(1)
        before, known = apart.gather(1, begins), words[..., 0] > 0
        follows = known & F.pad(before[:, 1:] == before[:, :-1], (1, 0))
        start = starts.gather(1, begins)
        capital = ((start == CAPITAL) | (start == CAPITAL_WITHIN)) & (words[..., 0] >= LETTER)
        small = (follows & ~capital).sum(1) / follows.sum(1).clamp(min=1)
        capitalised = capital & ~torch.isin(word_hashes(words), _BESIDE_NAMES.to(words.device))
        return cls(words, capitalised, follows, small >= MIN_SMALL_SHARE)


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
    return split_with_tokens(letters)[0]


def split_with_tokens(letters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the words in rows of letters, as :func:`split_words` does, and in which of the W each begins (B, n)."""
    stream, number, token = _numbered(letters)
    first = (number >= 0) & ~F.pad(number[:, :-1] >= 0, (1, 0))
    column = torch.arange(stream.shape[1], device=stream.device)
    place = column - torch.where(first, column, 0).cummax(1).values
    count = max(1, int(number.max()) + 1)
    within = (number >= 0) & (place < WORD_CHARS)
    index = (number * WORD_CHARS + place).where(within, count * WORD_CHARS)
    words = stream.new_zeros(len(stream), count * WORD_CHARS + 1).scatter(1, index, stream * within)
    begins = token.new_zeros(len(stream), count + 1).scatter(1, number.where(first, count), token)
    return words[:, :-1].reshape(len(stream), count, WORD_CHARS), begins[:, :-1]


def word_of_tokens(letters: Tensor) -> Tensor:
    """Return the number of the last word that each token in rows of letters (B, W, c) has letters of, -1 for none:
    (B, W).
    """
    _, number, token = _numbered(letters)
    return number.new_full(letters.shape[:2], -1).scatter_reduce(1, token, number, "amax")


def _numbered(letters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of letters (B, W, c) without gaps (B, L), with two numbers of each: of its word, -1 for what parts
    words (B, L), and of its token (B, L).
    """
    stream = letters.flatten(1)
    order, there = marked_to_front(stream > 0)
    stream = stream.gather(1, order) * there
    letter = stream > SEPARATOR
    number = (letter & ~F.pad(letter[:, :-1], (1, 0))).long().cumsum(1) - 1
    return stream, number.where(letter, -1), order // letters.shape[2]


def word_hashes(words: Tensor) -> Tensor:
    """Return a number for each word (..., c), 0 for none: (...); the zeros behind a word add nothing."""
    powers = [pow(_FACTOR, place, 1 << 61) for place in range(words.shape[-1])]
    return (words.long() * words.new_tensor(powers, dtype=torch.long)).sum(-1)


def numbers_in(words: Tensor) -> Tensor:
    """Return the numbers, runs of digits, in rows of words (B, n, c): (B, m, ``WORD_CHARS``), zeros behind."""
    return split_words(F.pad(words.where(words < LETTER, SEPARATOR), (1, 0), value=SEPARATOR))


def written_words(words: str) -> Tensor:
    """Return the numbers of words in small Latin letters, as :func:`word_hashes` has them: (n,)."""
    rows = [[LETTER + ord(letter) - ord("a") for letter in word] for word in words.split()]
    return word_hashes(torch.tensor([[*row, *[0] * (WORD_CHARS - len(row))] for row in rows]))


def has_digits(words: Tensor) -> Tensor:
    """Return which words (..., c) have a digit in them: (...)."""
    return ((words >= DIGIT) & (words < LETTER)).any(-1)


# Words with a capital that may stand beside a name and are none of it: titles, and those that begin a question.
_BESIDE_NAMES = written_words(
    "mr mrs ms miss dr prof professor sir dame lord lady king queen prince princess emperor empress duke duchess count "
    "countess baron baroness earl president chancellor premier minister governor mayor senator justice judge general "
    "colonel major captain lieutenant sergeant admiral commander pope bishop archbishop cardinal rabbi imam sheikh "
    "coach chef inspector officer ceo inc ltd llc corp plc gmbh herr frau madame monsieur "
    "is are was were am be did do does has have had can could will would should shall may might must who whom whose "
    "what which when where why how if in on at of to by for from with as and or but the a an this that these those not "
    "no yes please tell name give i"
)
