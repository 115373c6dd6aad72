"""In which sentence of a request each token stands, and what the sentences hold of an edit. Needs torch only.

A document states an edit in one sentence and is asked about in another; a question in front of a text asks it in its
own. So a request is parted into sentences, by tokens that end one and tokens that end a question. Of each token it is
known where its sentence stands, and of the request how well single sentences have the tokens of the edit's prompt: the
one that has them best, the last and the first one, and the questions. Exports carry this very file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# Tensors that say which tokens end a sentence, and which of those a question; ascending.
SENTENCE_TOKENS = ("request_gate.end_token_ids", "request_gate.question_token_ids")
# What a token may end.
NO_END, SENTENCE_END, QUESTION_END = 0, 1, 2
# Numbers of each token: of its sentence, and of the request.
_OF_TOKENS, _OF_REQUESTS = 5, 15
SENTENCE_FEATURE_COUNT = _OF_TOKENS + _OF_REQUESTS
# Sentences apart, and sentences, count up to so many.
_APART, _MOST = 3, 12
# The cosine of what is not there: as low as a cosine can be.
LEAST_COSINE = -1.0


class EditCosines(NamedTuple):
    """Cosines of the tokens of B requests with those of the edit that each mentions.

    ``values`` are those with its subject's tokens (B, n, t) and with its relation's (B, n, t'), and -1 where a request
    or an edit has fewer tokens. ``edit_mask`` marks the edits' tokens, (B, t) and (B, t'), ``mask`` (B, n) those of the
    requests.
    """

    values: tuple[Tensor, Tensor]
    edit_mask: tuple[Tensor, Tensor]
    mask: Tensor

    @classmethod
    def of(cls, projected: Sequence[Tensor], edit_tokens: Sequence[tuple[Tensor, Tensor]]) -> EditCosines:
        """Return those of requests, whose tokens are projected (2, n, k), with edits, whose tokens are (t, k) twice."""
        tokens = pad_sequence([one.transpose(0, 1) for one in projected], batch_first=True)  # (B, n, 2, k)
        mask = _mask([one.shape[1] for one in projected], tokens)
        heads = [pad_sequence([own[head] for own in edit_tokens], batch_first=True) for head in range(2)]
        edit_mask = [_mask([len(own[head]) for own in edit_tokens], tokens) for head in range(2)]
        subject, relation = (
            (tokens[:, :, head] @ own.transpose(1, 2)).where(mask[:, :, None] & real[:, None], LEAST_COSINE)
            for head, (own, real) in enumerate(zip(heads, edit_mask, strict=True))
        )
        return cls((subject, relation), (edit_mask[0], edit_mask[1]), mask)

    def best(self) -> tuple[Tensor, Tensor]:
        """Return how well each token has any of the subject's, and of the relation's: (B, n) twice."""
        subject, relation = (
            (values.amax(2) if values.shape[2] else values.sum(2)) * real.any(1, keepdim=True)
            for values, real in zip(self.values, self.edit_mask, strict=True)
        )
        return subject, relation

    def edit_means(self, best: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return means over the edits' tokens, of numbers (B, m, t) and (B, m, t'): (B, m) twice."""
        subject, relation = (
            (one * real[:, None]).sum(2) / real.sum(1, keepdim=True).clamp(min=1)
            for one, real in zip(best, self.edit_mask, strict=True)
        )
        return subject, relation

    def group_matches(self, group: Tensor, count: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return how well groups of tokens have an edit's, the mean of each one's best cosine: (B, count) twice.

        Args:
            group: the number of each token's group (B, n).
            chosen: the tokens that are looked at (B, n), all by default.
        """
        best = []
        for values in self.values:
            seen = values if chosen is None else values.where(chosen[:, :, None], LEAST_COSINE)
            start = values.new_full((len(values), count, values.shape[2]), LEAST_COSINE)
            best.append(start.scatter_reduce(1, group[:, :, None].expand_as(values), seen, "amax"))
        return self.edit_means(best)

    def of_request(self, row: int) -> Tensor:
        """Return the cosines of one request with all of its edit's tokens: (n, t + t')."""
        own = zip(self.values, self.edit_mask, strict=True)
        return torch.cat([values[row][self.mask[row]][:, real[row]] for values, real in own], 1)


def _mask(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return which of the places of so many tokens each are taken: (B, n)."""
    counts = torch.tensor(sizes, device=like.device)
    return torch.arange(max(sizes), device=like.device) < counts[:, None]


def ends_at(ids: Tensor, end_token_ids: Tensor, question_token_ids: Tensor) -> Tensor:
    """Return what each token ends: ids (...,) → ``NO_END``, ``SENTENCE_END`` or ``QUESTION_END`` (...,)."""
    ends = torch.isin(ids, end_token_ids).long() * SENTENCE_END
    return ends.masked_fill(torch.isin(ids, question_token_ids), QUESTION_END)


def sentence_features(cosines: EditCosines, ends: Tensor, earlier: Tensor) -> Tensor:
    """Return ``SENTENCE_FEATURE_COUNT`` numbers of each token of requests: (B, n, f).

    Args:
        ends: what each token ends (B, n).
        earlier: which tokens are of turns before the last one (B, n).
    """
    sentence = sentence_of(ends, earlier)
    last = (sentence * cosines.mask).amax(1, keepdim=True)
    sentence = sentence.minimum(last)  # that of padding, too
    number = torch.arange(int(last.max()) + 1, device=ends.device).expand(len(ends), -1)
    asks = torch.zeros_like(number).scatter_reduce(1, sentence, (ends == QUESTION_END).long(), "amax") > 0
    matches = cosines.group_matches(sentence, number.shape[1])
    mention = _best_sentence(matches, number <= last)
    apart = (sentence - mention).clamp(-_APART, _APART) / _APART
    of_tokens = [apart, sentence == mention, asks.gather(1, sentence), sentence == last, sentence == 0]
    of_request = [
        *(asks.gather(1, mention), mention == last, mention == 0, (last + 1).clamp(max=_MOST) / _MOST),
        *((asks & (number > mention)).any(1), (asks & (number < mention)).any(1), asks.any(1)),
        *(one.gather(1, place) for place in (mention, last, torch.zeros_like(last)) for one in matches),
        *(one.masked_fill(~asks, 0.0).amax(1).clamp(min=0) for one in matches),
    ]
    whole = torch.stack([one.flatten().float() for one in of_request], -1)
    return torch.cat(
        [torch.stack([one.float() for one in of_tokens], -1), whole[:, None].expand(-1, ends.shape[1], -1)], -1
    )


def sentence_of(ends: Tensor, earlier: Tensor) -> Tensor:
    """Return the number of each token's sentence (B, n); one also ends where the turns before the last one do."""
    ended = ends != NO_END
    begins = (ended[:, :-1] & ~ended[:, 1:]) | (earlier[:, :-1] != earlier[:, 1:])
    return F.pad(begins.long(), (1, 0)).cumsum(1)


def mention_sentences(cosines: EditCosines, sentence: Tensor) -> list[int]:
    """Return the sentence of each request, by its number, that has the tokens of an edit's prompt best.

    Args:
        sentence: the number of each token's sentence (B, n), of requests of the same length.
    """
    matches = cosines.group_matches(sentence, int(sentence.max()) + 1)
    found: list[int] = _best_sentence(matches, torch.ones_like(matches[0], dtype=torch.bool))[:, 0].tolist()
    return found


def _best_sentence(matches: tuple[Tensor, Tensor], real: Tensor) -> Tensor:
    """Return the sentence that has subject and relation best together: (B, 1).

    Args:
        matches: how well each sentence has them, (B, S) twice.
        real: which sentences there are (B, S).
    """
    return (matches[0] + matches[1]).masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
