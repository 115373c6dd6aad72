"""In which sentence of a request each token stands, and what the sentences hold of an edit. Needs torch only.

A document states an edit in one sentence and is asked about in another; a question in front of a text asks it in its
own. So a request is parted into sentences, by tokens that end one and tokens that end a question. Of each token it is
known where its sentence stands, and of the request how well single sentences have the tokens of the edit's prompt: the
one that has them best, the last and the first one, and the questions. Exports carry this very file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Tensors that say which tokens end a sentence, and which of those a question; ascending.
SENTENCE_TOKENS = ("request_gate.end_token_ids", "request_gate.question_token_ids")
# What a token may end.
NO_END, SENTENCE_END, QUESTION_END = 0, 1, 2
# Numbers of each token: of its sentence, and of the request.
_OF_TOKENS, _OF_REQUESTS = 5, 15
SENTENCE_FEATURE_COUNT = _OF_TOKENS + _OF_REQUESTS
# Sentences apart, and sentences, count up to so many.
_APART, _MOST = 3, 12


def ends_at(ids: Tensor, end_token_ids: Tensor, question_token_ids: Tensor) -> Tensor:
    """Return what each token ends: ids (...,) → ``NO_END``, ``SENTENCE_END`` or ``QUESTION_END`` (...,)."""
    ends = torch.isin(ids, end_token_ids).long() * SENTENCE_END
    return ends.masked_fill(torch.isin(ids, question_token_ids), QUESTION_END)


def sentence_features(cosines: list[Tensor], ends: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Return ``SENTENCE_FEATURE_COUNT`` numbers of each token of a request: (n, f).

    Args:
        cosines: of the request's tokens with those of the edit's subject, and of its relation: (n, t) twice.
        ends: what each token ends (n,).
        earlier: which tokens are of turns before the last one (n,), if any are.
    """
    sentence = sentence_of(ends, earlier)
    count = int(sentence[-1]) + 1
    asks = torch.zeros(count, device=ends.device).index_add(0, sentence, (ends == QUESTION_END).float()).clamp(max=1)
    matches = [_sentence_match(one, sentence, count) for one in cosines]
    mention = _best_match(matches)
    apart = (sentence - mention).clamp(-_APART, _APART) / _APART
    places = [(sentence == place).float() for place in (mention, count - 1, 0)]
    of_tokens = torch.stack([apart, places[0], asks[sentence], places[1], places[2]], -1)
    questions, nothing = asks > 0, asks.new_zeros(1)
    of_request = [
        *(float(mention == place) for place in (count - 1, 0)),
        min(count, _MOST) / _MOST,
        *(float(part.any()) for part in (questions[mention + 1 :], questions[:mention], questions)),
        *(float(one[place]) for place in (mention, -1, 0) for one in matches),
        *(float(torch.cat([one[questions], nothing]).max()) for one in matches),
    ]
    whole = torch.tensor([float(asks[mention]), *of_request], device=ends.device)
    return torch.cat([of_tokens, whole.expand(len(ends), -1)], -1)


def sentence_of(ends: Tensor, earlier: Tensor | None) -> Tensor:
    """Return the number of each token's sentence (n,): one begins behind the last of the tokens that end one."""
    ended = ends != NO_END
    begins = ended[:-1] & ~ended[1:]
    if earlier is not None:
        begins = begins | (earlier[:-1] != earlier[1:])
    return F.pad(begins.long(), (1, 0)).cumsum(0)


def mention_sentence(cosines: list[Tensor], sentence: Tensor) -> int:
    """Return the sentence, by its number, that has the tokens of an edit's prompt best.

    Args:
        cosines: as for :func:`sentence_features`.
        sentence: the number of each token's sentence (n,).
    """
    return _best_match([_sentence_match(one, sentence, int(sentence[-1]) + 1) for one in cosines])


def _best_match(matches: list[Tensor]) -> int:
    """Return the sentence that has subject and relation best together: how well each has them, (count,) twice."""
    return int((matches[0] + matches[1]).argmax())


def _sentence_match(cosines: Tensor, sentence: Tensor, count: int) -> Tensor:
    """Return how well each sentence has the tokens of a prompt, the mean of each one's best cosine: (count,)."""
    if not cosines.shape[1]:
        return cosines.new_zeros(count)
    best = cosines.new_full((count, cosines.shape[1]), -1.0)
    return best.scatter_reduce(0, sentence[:, None].expand_as(cosines), cosines, "amax").mean(1)
