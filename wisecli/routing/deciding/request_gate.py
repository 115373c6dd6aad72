"""Decides whether a prompt asks for the edit that it mentions. Needs torch only; exports carry this very file.

Late interaction finds an edit's words in a prompt; it does not see what the prompt wants with them. A prompt that has a
question translated, that asks it of another time, or that holds it in a document mentions the edit and asks something
else. So the tokens around the mention, and those that the request begins and ends with, are pooled by attention, each
with how well the edit explains it:

    c      = argmax_c Σ_t max_{|s - c| ≤ SPREAD} cos(z(e_t), z(q_s))        the middle of the mention
    u_s    = [R x_s + b ; cosines of s with the edit ; places of s ; how request, sentences and names have the edit]
    pooled = [Σ_s softmax_s(A_h u_s) relu(V_h u_s)]_h                       h: heads
    log-odds = out · relu(mix pooled)

One gate serves all edits of a base model: what tells a request from a mention does not depend on the fact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.name_features import WORD_STARTS, name_features, starts_of
from wisecli.routing.deciding.sentence_features import SENTENCE_TOKENS, ends_at, sentence_features

# Tensors of the gate that are learned; the last column of each is added.
REQUEST_GATE = (
    "request_gate.read",
    "request_gate.attend",
    "request_gate.value",
    "request_gate.mix",
    "request_gate.out",
)
# The log-odds that a prompt must exceed to ask an edit, of each edit.
LOGIT_OFFSET = "request_gate.logit_offset"
# How far around its middle the words of a mention may lie, and the tokens around it that are read; and how many of
# those that a request begins and ends with.
MENTION_RADIUS, CONTEXT_RADIUS = 10, 28
FIRST_TOKENS, LAST_TOKENS = 10, 28
# What is known of a token besides its state.
FEATURE_COUNT = 13
# Places count in tens, up to so many; distances to the ends of what is asked up to so many tokens.
_TENS, _EDGE = 4.0, 64.0


# Tensors that say what tokens are for sentences and names; gates of older versions lack some.
TOKEN_MARKS = (*SENTENCE_TOKENS, WORD_STARTS)


class TokenMarks(NamedTuple):
    """What each token of a request ends, and how it begins (n,), where names are heeded."""

    ends: Tensor
    starts: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, tensors: Mapping[str, Tensor]) -> TokenMarks:
        """Return the marks of tokens (n,), by all or the first two of ``TOKEN_MARKS``."""
        ends = ends_at(ids, *(tensors[name] for name in SENTENCE_TOKENS))
        return cls(ends, starts_of(ids, tensors[WORD_STARTS]) if WORD_STARTS in tensors else None)

    def behind_one_more(self) -> TokenMarks:
        """Return the same behind a token without marks."""
        starts = None if self.starts is None else F.pad(self.starts, (1, 0))
        return TokenMarks(F.pad(self.ends, (1, 0)), starts)


class Mention(NamedTuple):
    """The tokens around a mention: their states (n, d), and ``FEATURE_COUNT`` numbers of each (n, f), with
    ``SENTENCE_FEATURE_COUNT`` more where sentences are heeded, and ``NAME_FEATURE_COUNT`` where names are.
    """

    states: Tensor
    features: Tensor


class Mentions(NamedTuple):
    """B of them, one behind the other: ``states`` (N, d), ``features`` (N, f), and whose each token is
    ``mention_index`` (N,).
    """

    states: Tensor
    features: Tensor
    mention_index: Tensor
    size: int


class RequestGate(nn.Module):
    """The gate with its tensors, which become buffers.

    ``read`` (r, d + 1), ``attend`` (H, r + f + 1), ``value`` (H · v, r + f + 1), ``mix`` (m, H · v + 1), ``out``
    (1, m + 1), ``logit_offset`` (M,); ``TOKEN_MARKS``, of which gates of older versions lack some.

    Args:
        tensors: all of ``REQUEST_GATE``, ``LOGIT_OFFSET``, and those of ``TOKEN_MARKS`` that it was learned with.
    """

    read: Tensor
    attend: Tensor
    value: Tensor
    mix: Tensor
    out: Tensor
    logit_offset: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in (*REQUEST_GATE, LOGIT_OFFSET):
            self.register_buffer(name.removeprefix("request_gate."), tensors[name].float())
        self._marked_by = tuple(name for name in TOKEN_MARKS if name in tensors)
        for name in self._marked_by:
            self.register_buffer(name.removeprefix("request_gate."), tensors[name])

    def forward(self, mentions: Mentions, edits: Tensor) -> Tensor:
        """Return the log-odds that prompts ask the edits (B,) that they mention, above the offsets of those: (B,)."""
        return self.log_odds(mentions) - self.logit_offset[edits].float()

    def marks(self, ids: Tensor) -> TokenMarks | None:
        """Return the marks of tokens (n,), if the gate heeds any."""
        if not self._marked_by:
            return None
        return TokenMarks.of(ids, {name: getattr(self, name.removeprefix("request_gate.")) for name in self._marked_by})

    def log_odds(self, mentions: Mentions) -> Tensor:
        """Return the log-odds that prompts ask what they mention: (B,)."""
        return log_odds(
            {name: getattr(self, name.removeprefix("request_gate.")).float() for name in REQUEST_GATE}, mentions
        )


def log_odds(
    weights: Mapping[str, Tensor], mentions: Mentions, dropout: Callable[[Tensor], Tensor] = lambda values: values
) -> Tensor:
    """Return the log-odds that prompts ask for the edits that they mention: (B,).

    Args:
        weights: all of ``REQUEST_GATE``.
        dropout: what leaves out some values while the gate is learned.
    """
    read, attend, value, mix, out = (weights[name] for name in REQUEST_GATE)
    mention_index, inputs = (
        mentions.mention_index,
        torch.cat([dropout(_linear(read, mentions.states)), mentions.features], -1),
    )
    attended = _linear(attend, inputs)  # (N, H)
    highest = attended.new_full((mentions.size, len(attend)), -torch.inf)
    highest = highest.scatter_reduce(0, mention_index[:, None].expand_as(attended), attended.detach(), "amax")
    shares = (attended - highest[mention_index]).exp()
    shares = shares / torch.zeros_like(highest).index_add(0, mention_index, shares)[mention_index]
    values = _linear(value, inputs).relu().unflatten(-1, (len(attend), -1))  # (N, H, v)
    pooled = values.new_zeros(mentions.size, len(value)).index_add(
        0, mention_index, (shares[..., None] * values).flatten(1)
    )
    return _linear(out, _linear(mix, dropout(pooled)).relu())[:, 0]


def _linear(weights: Tensor, values: Tensor) -> Tensor:
    return F.linear(values, weights[:, :-1], weights[:, -1])


def mention_features(
    states: Tensor,
    projected: Tensor,
    edit_tokens: tuple[Tensor, Tensor],
    *,
    earlier: Tensor | None = None,
    first_state: Tensor | None = None,
    marks: TokenMarks | None = None,
) -> Mention:
    """Return the tokens around a mention, and those that the request begins and ends with, with their features.

    Args:
        states: of the tokens of the request (n, d).
        projected: the same under both projections, of length 1 (2, n, k).
        edit_tokens: the subject's tokens of the edit's own prompt under the first projection, and the relation's under
            the second, (t, k).
        earlier: which tokens are of turns before the last one (n,), if any are.
        first_state: the state of a token before those (d,), which is compared with nothing: attention rests on it.
        marks: those of each token, where sentences are heeded.
    """
    if first_state is not None:
        states, projected = torch.cat([first_state[None].to(states), states]), F.pad(projected, (0, 0, 1, 0))
        earlier = None if earlier is None else F.pad(earlier, (1, 0))
        marks = None if marks is None else marks.behind_one_more()
    cosines = [best @ part.T for best, part in zip(projected, edit_tokens, strict=True)]
    found = torch.cat([one / max(1, one.shape[1]) for one in cosines], 1)
    # For each place the best of its neighbours, for every token of the edit.
    neighbourhood = F.max_pool1d(found.T[None], 2 * MENTION_RADIUS + 1, 1, MENTION_RADIUS)[0].sum(0)
    place = torch.arange(len(states), device=states.device)
    distance, behind = place - neighbourhood.argmax(), len(states) - 1 - place
    near = distance.abs() <= CONTEXT_RADIUS
    kept = near | (place < FIRST_TOKENS) | (behind < LAST_TOKENS)
    best = [one.amax(1) if one.shape[1] else one.new_zeros(len(one)) for one in cosines]
    edges = [torch.log1p(edge.float().clamp(max=_EDGE)) / 4 for edge in (behind, place)]
    signs = [(distance / 10).clamp(-_TENS, _TENS), (distance / 10).abs().clamp(max=_TENS)]
    where = [near.float(), torch.zeros_like(best[0]) if earlier is None else earlier.float()]
    every = torch.stack([*best, torch.maximum(*best), *signs, *edges, *where], -1)
    features = [every, _match_quality(cosines).expand(len(states), -1)]
    if marks is not None:
        features.append(sentence_features(cosines, marks.ends, earlier))
        if marks.starts is not None:
            features.append(name_features(cosines, marks.starts, marks.ends, earlier))
    return Mention(states[kept].float(), torch.cat(features, -1)[kept])


def _match_quality(cosines: list[Tensor]) -> Tensor:
    """Return how well a request has the tokens of an edit's subject and relation: the least and the mean of each
    (4,).
    """
    found = []
    for one in cosines:
        best = one.amax(0) if one.shape[1] else one.new_zeros(1)
        found += [best.min(), best.mean()]
    return torch.stack(found)


def starts_with_word(ids: Tensor, non_padding: Tensor, compared: Tensor, special_ids: Tensor) -> Tensor:
    """Return whether the first token of each prompt is a word, and no special token: (B,).

    Args:
        ids: tokens (B, T).
        non_padding: which of them are no padding (B, T).
        compared: which of them are compared (B, T).
        special_ids: special tokens.
    """
    first = non_padding.to(torch.int8).argmax(1, keepdim=True)
    word = non_padding.any(1, keepdim=True) & ~torch.isin(ids.gather(1, first), special_ids)
    follows = compared.gather(1, (first + 1).clamp(max=ids.shape[1] - 1)) & ~compared.gather(1, first)
    return (word & follows)[:, 0]


def batch_mentions(mentions: Sequence[Mention]) -> Mentions:
    """Return several mentions as one batch."""
    sizes = torch.tensor([len(one.states) for one in mentions], device=mentions[0].states.device)
    of = torch.arange(len(mentions), device=sizes.device).repeat_interleave(sizes)
    states, features = (torch.cat([one[part] for one in mentions]) for part in (0, 1))
    return Mentions(states, features, of, len(mentions))
