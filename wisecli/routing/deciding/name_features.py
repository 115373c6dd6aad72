"""Whether the name that a request mentions goes on beyond an edit's subject. Needs torch only.

"Ana Ruiz Senior" is not Ana Ruiz, though all of her name is there. A name is a run of words that begin with a capital
or a digit, or that the subject has. Of the run that has the subject best it is known how well the edit explains its
words: in a longer name one of them is explained by nothing. A sentence's first word has its capital anyway, and a text
whose words all have one has no names. Exports carry this very file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.sentence_features import NO_END

# The tensor that says how every token begins (v,): one of the following.
WORD_STARTS = "request_gate.word_starts"
# No word; a word behind a space, in small letters or with a capital or a digit; and the same without a space, which
# goes on with the word before it, if there is one.
NO_WORD, SMALL, CAPITAL, SMALL_WITHIN, CAPITAL_WITHIN = range(5)
# Numbers of each token, and of the request.
_OF_TOKENS, _OF_REQUESTS = 2, 6
NAME_FEATURE_COUNT = _OF_TOKENS + _OF_REQUESTS
# A text of which a smaller share of words, those apart that open a sentence, is in small letters has no names.
_MIN_SMALL = 0.2
# From this cosine on the subject has a word; below that one nothing of the edit explains it.
_OF_SUBJECT, _EXPLAINED = 0.7, 0.5
# Words that nothing explains, and words of a name, count up to so many.
_MOST_UNEXPLAINED, _MOST_WORDS = 3, 6


class _Words(NamedTuple):
    """The words of a request: which one each token is of (n,); how each begins, and which open a sentence (w,)."""

    of_token: Tensor
    start: Tensor
    opens_sentence: Tensor

    @property
    def capital(self) -> Tensor:
        """Which words have a capital or are numbers (w,)."""
        return (self.start == CAPITAL) | (self.start == CAPITAL_WITHIN)

    @property
    def small_share(self) -> float:
        """The share of words in small letters, of those within sentences."""
        within = self.start[~self.opens_sentence & (self.start != NO_WORD)]
        return float(((within == SMALL) | (within == SMALL_WITHIN)).float().mean()) if len(within) else 0.0


def starts_of(ids: Tensor, word_starts: Tensor) -> Tensor:
    """Return how tokens begin: ids (...,) → ``NO_WORD`` to ``CAPITAL_WITHIN`` (...,)."""
    return word_starts[ids.clamp(max=len(word_starts) - 1)].long()


def name_features(cosines: list[Tensor], starts: Tensor, ends: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Return ``NAME_FEATURE_COUNT`` numbers of each token of a request: (n, f).

    Args:
        cosines: of the request's tokens with those of the edit's subject, and of its relation: (n, t) twice.
        starts: how each token begins (n,).
        ends: which sentence each token ends, if any (n,).
        earlier: which tokens are of turns before the last one (n,), if any are.
    """
    words = _words(starts, ends, earlier)
    if not cosines[0].shape[1] or words.small_share < _MIN_SMALL:
        return torch.zeros(len(starts), NAME_FEATURE_COUNT, device=starts.device)
    of_subject = _best_of_words(cosines[0].amax(1), words) > _OF_SUBJECT
    named = words.capital | of_subject
    run = F.pad((named[1:] & ~named[:-1]).long(), (1, 0)).cumsum(0)
    match = _best_match(cosines[0], run[words.of_token], named[words.of_token], int(run[-1]) + 1)
    named = named & (run == match.argmax())
    explained = _best_of_words(torch.cat(cosines, 1).amax(1), words).masked_fill(words.opens_sentence, 1.0)
    # Nothing is a name where neither capitals nor the subject are.
    explained = explained[named] if named.any() else explained.new_ones(1)
    unexplained = (explained < _EXPLAINED).sum().clamp(max=_MOST_UNEXPLAINED) / _MOST_UNEXPLAINED
    count = named.sum().clamp(max=_MOST_WORDS) / _MOST_WORDS
    numbers = torch.stack([match.max(), explained.min(), explained[0], explained[-1], unexplained, count])
    of_tokens = torch.stack([words.capital[words.of_token], named[words.of_token]], -1).float()
    return torch.cat([of_tokens, numbers.float().expand(len(starts), -1)], -1)


def _words(starts: Tensor, ends: Tensor, earlier: Tensor | None) -> _Words:
    """Return the words of a request; what is no word is one of its own."""
    opens = F.pad(ends[:-1] != NO_END, (1, 0), value=True)
    if earlier is not None:
        opens = opens | F.pad(earlier[:-1] != earlier[1:], (1, 0))
    goes_on = (starts >= SMALL_WITHIN) & F.pad(starts[:-1] != NO_WORD, (1, 0)) & ~opens
    return _Words((~goes_on).long().cumsum(0) - 1, starts[~goes_on], opens[~goes_on])


def _best_match(subject: Tensor, run: Tensor, named: Tensor, count: int) -> Tensor:
    """Return how well each run of words has the tokens of a subject, the mean of each one's best cosine: (count,)."""
    best = subject.new_full((count, subject.shape[1]), -1.0)
    near = subject.masked_fill(~named[:, None], -1.0)
    return best.scatter_reduce(0, run[:, None].expand_as(near), near, "amax").mean(1)


def _best_of_words(values: Tensor, words: _Words) -> Tensor:
    """Return the best value among the tokens (n,) of each word, one with a slip is explained in part: (w,)."""
    return values.new_full((len(words.start),), -1.0).scatter_reduce(0, words.of_token, values, "amax")
