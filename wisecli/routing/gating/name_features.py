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

from wisecli.routing.gating.sentence_features import LEAST_COSINE, NO_END, EditCosines

# The tensor that says how every token begins (v,): one of the following.
WORD_STARTS = "request_gate.word_starts"
# No word; a word behind a space, in small letters or with a capital or a digit; and the same without a space, which
# goes on with the word before it, if there is one.
NO_WORD, SMALL, CAPITAL, SMALL_WITHIN, CAPITAL_WITHIN = range(5)
# Numbers of each token, and of the request.
_OF_TOKENS, _OF_REQUESTS = 2, 6
NAME_FEATURE_COUNT = _OF_TOKENS + _OF_REQUESTS
# A text of which a smaller share of words, those apart that open a sentence, is in small letters has no names.
MIN_SMALL_SHARE = 0.2
# From this cosine on the subject has a word; below that one nothing of the edit explains it.
_OF_SUBJECT, _EXPLAINED = 0.7, 0.5
# Words that nothing explains, and words of a name, count up to so many.
_MOST_UNEXPLAINED, _MOST_WORDS = 3, 6


class _Words(NamedTuple):
    """The words of B requests: which one each token is of (B, n); how each begins, and which open a sentence (B, w).

    Shorter requests are filled up with tokens that are no words.
    """

    of_token: Tensor
    start: Tensor
    opens_sentence: Tensor

    @classmethod
    def of(cls, starts: Tensor, ends: Tensor, earlier: Tensor) -> _Words:
        """Return the words of requests; what is no word is one of its own."""
        opens = F.pad((ends[:, :-1] != NO_END) | (earlier[:, :-1] != earlier[:, 1:]), (1, 0), value=True)
        goes_on = (starts >= SMALL_WITHIN) & F.pad(starts[:, :-1] != NO_WORD, (1, 0)) & ~opens
        of_token = (~goes_on).long().cumsum(1) - 1
        count = int(of_token.max()) + 1
        # Of each word the first token is looked at, the only one that does not go on with it.
        start = starts.new_full((len(starts), count), NO_WORD)
        start = start.scatter_reduce(1, of_token, starts.masked_fill(goes_on, NO_WORD), "amax")
        opening = torch.zeros_like(start).scatter_reduce(1, of_token, (opens & ~goes_on).long(), "amax")
        return cls(of_token, start, opening > 0)

    @property
    def capital(self) -> Tensor:
        """Which words have a capital or are numbers (B, w)."""
        return (self.start == CAPITAL) | (self.start == CAPITAL_WITHIN)

    @property
    def small_share(self) -> Tensor:
        """The share of words in small letters, of those within sentences: (B,)."""
        within = ~self.opens_sentence & (self.start != NO_WORD)
        small = within & ((self.start == SMALL) | (self.start == SMALL_WITHIN))
        return small.sum(1) / within.sum(1).clamp(min=1)

    def best(self, values: Tensor) -> Tensor:
        """Return the best value among the tokens (B, n) of each word, one with a slip is explained in part: (B, w)."""
        start = values.new_full(self.start.shape, LEAST_COSINE)
        return start.scatter_reduce(1, self.of_token, values, "amax")


def starts_of(ids: Tensor, word_starts: Tensor) -> Tensor:
    """Return how tokens begin: ids (...,) → ``NO_WORD`` to ``CAPITAL_WITHIN`` (...,)."""
    return word_starts[ids.clamp(max=len(word_starts) - 1)].long()


def name_features(cosines: EditCosines, starts: Tensor, ends: Tensor, earlier: Tensor) -> Tensor:
    """Return ``NAME_FEATURE_COUNT`` numbers of each token of requests: (B, n, f).

    Args:
        starts: how each token begins (B, n).
        ends: which sentence each token ends, if any (B, n).
        earlier: which tokens are of turns before the last one (B, n).
    """
    words = _Words.of(starts, ends, earlier)
    in_name = words.capital | (words.best(cosines.best()[0]) > _OF_SUBJECT)
    run = F.pad((in_name[:, 1:] & ~in_name[:, :-1]).long(), (1, 0)).cumsum(1)
    run_of_token, token_in_name = run.gather(1, words.of_token), in_name.gather(1, words.of_token)
    match = cosines.group_matches(run_of_token, int(run.max()) + 1, token_in_name)[0]
    in_best_run = in_name & (run == match.argmax(1, keepdim=True))
    explained = words.best(torch.cat(cosines.values, 2).amax(2))
    of_request = _of_request(words, in_best_run, explained, match.amax(1))
    of_tokens = torch.stack([one.gather(1, words.of_token).float() for one in (words.capital, in_best_run)], -1)
    features = torch.cat([of_tokens, of_request[:, None].expand(-1, starts.shape[1], -1)], -1)
    has_names = cosines.edit_mask[0].any(1) & (words.small_share >= MIN_SMALL_SHARE)
    return features * has_names[:, None, None]


def _of_request(words: _Words, name: Tensor, explained: Tensor, match: Tensor) -> Tensor:
    """Return ``_OF_REQUESTS`` numbers of requests: (B, f).

    Args:
        name: the words of the run that has the subject best (B, w).
        explained: how well an edit explains each word (B, w).
        match: how well that run has the subject (B,).
    """
    # Nothing is a name where neither capitals nor the subject are.
    explained = explained.masked_fill(words.opens_sentence | ~name, 1.0)
    unexplained = ((explained < _EXPLAINED) & name).sum(1).clamp(max=_MOST_UNEXPLAINED) / _MOST_UNEXPLAINED
    place = torch.arange(name.shape[1], device=name.device)
    first, last = (place.where(name, name.shape[1]).amin(1), place.where(name, -1).amax(1))
    ends = [explained.gather(1, one.clamp(0, name.shape[1] - 1)[:, None])[:, 0] for one in (first, last)]
    count = name.sum(1).clamp(max=_MOST_WORDS) / _MOST_WORDS
    return torch.stack([match, explained.amin(1), *ends, unexplained, count], -1).float()
