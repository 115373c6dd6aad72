"""Decides whether a prompt asks for the edit that it mentions. Needs torch only; exports carry this very file.

Late interaction finds an edit's words in a prompt; it does not see what the prompt wants with them. A prompt that has a
question translated, that asks it of another time, or that holds it in a document mentions the edit and asks something
else. So the tokens around the mention, and those that the request begins and ends with, are pooled by attention, each
with how well the edit explains it:

    c      = argmax_c Σ_t max_{|s - c| ≤ SPREAD} cos(z(e_t), z(q_s))        the middle of the mention
    u_s    = [R x_s + b ; cosines of s with the edit ; places of s ; how request, sentences and names have the edit]
    pooled = [Σ_s softmax_s(A_h u_s) relu(V_h u_s)]_h                       h: heads
    log-odds = out · relu(mix pooled)

One gate serves all edits of a base model: what tells a request from a mention does not depend on the fact. A second one
of the same kind, the deep gate, reads the states of a deeper layer for prompts that the first may let through; the mean
of their log-odds decides, as they seldom err together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from wisecli.routing.gating.name_features import WORD_STARTS, name_features, starts_of
from wisecli.routing.gating.sentence_features import SENTENCE_TOKENS, EditCosines, ends_at, sentence_features

# Tensors of the gate that are learned; the last column of each is added.
REQUEST_GATE = (
    "request_gate.read",
    "request_gate.attend",
    "request_gate.value",
    "request_gate.mix",
    "request_gate.out",
)
# The same of the deep gate, of memories that have one.
DEEP_GATE = tuple(name.replace("request_", "deep_") for name in REQUEST_GATE)
# A prompt that is less likely than this to mean an edit does not come to the gate.
MIN_GATED_PROB = 0.1
# The log-odds that a prompt must exceed to ask an edit, of each edit.
LOGIT_OFFSET, DEEP_LOGIT_OFFSET = "request_gate.logit_offset", "deep_gate.logit_offset"
# How far around its middle the words of a mention may lie, and the tokens around it that are read; and how many of
# those that a request begins and ends with.
MENTION_RADIUS, CONTEXT_RADIUS = 10, 28
FIRST_TOKENS, LAST_TOKENS = 10, 28
# What is known of a token besides its state.
FEATURE_COUNT = 13
# Places count in tens, up to so many; distances to the ends of what is asked up to so many tokens.
_TENS, _EDGE = 4.0, 64.0
# From these log-odds on a prompt surely means its edit; what others lack to them counts so many times.
_SURE, _UNSURE_WEIGHT = 0.5, 2.0
# Sums of cosines that differ by less are the same.
_ALIKE = 1e-5
# Tensors that say what tokens are for sentences and names; gates of older versions lack some.
TOKEN_MARKS = (*SENTENCE_TOKENS, WORD_STARTS)


class TokenMarks(NamedTuple):
    """What each token of a request ends, and how it begins (n,), where names are used."""

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


class Request(NamedTuple):
    """A request, and the edit that it mentions.

    ``states`` are of the tokens of the request (n, d), ``projected`` the same under both projections, of length 1
    (2, n, k). ``edit_tokens`` are the subject's tokens of the edit's own prompt under the first projection, and the
    relation's under the second, (t, k). ``earlier`` says which tokens are of turns before the last one (n,), if any
    are; ``first_state`` is the state of a token before those (d,), which is compared with nothing: attention rests on
    it. ``marks`` are those of each token, where sentences are heeded.
    """

    states: Tensor
    projected: Tensor
    edit_tokens: tuple[Tensor, Tensor]
    earlier: Tensor | None = None
    first_state: Tensor | None = None
    marks: TokenMarks | None = None

    def from_first_state(self) -> Request:
        """Return the same with the token of the first state as one of the others, without marks."""
        if self.first_state is None:
            return self
        states = torch.cat([self.first_state[None].to(self.states), self.states])
        earlier = None if self.earlier is None else F.pad(self.earlier, (1, 0))
        marks = None if self.marks is None else self.marks.behind_one_more()
        return Request(states, F.pad(self.projected, (0, 0, 1, 0)), self.edit_tokens, earlier, None, marks)


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
            self.register_buffer(name.removeprefix("request_gate."), tensors[name])
        self._marked_by = tuple(name for name in TOKEN_MARKS if name in tensors)
        for name in self._marked_by:
            self.register_buffer(name.removeprefix("request_gate."), tensors[name])

    @classmethod
    def deep(cls, tensors: Mapping[str, Tensor]) -> RequestGate:
        """Return the deep gate of tensors ``DEEP_GATE`` and ``DEEP_LOGIT_OFFSET``; it marks no tokens itself."""
        names = zip((*REQUEST_GATE, LOGIT_OFFSET), (*DEEP_GATE, DEEP_LOGIT_OFFSET), strict=True)
        return cls({name: tensors[own] for name, own in names})

    def forward(self, mentions: Mentions, edits: Tensor, edit_probs: Tensor) -> Tensor:
        """Return the log-odds that prompts ask the edits (B,) that they mention, above the offsets of those: (B,).

        Args:
            edit_probs: how likely each prompt means its edit (B,).
        """
        mentions = Mentions(*mentions)  # as what wraps modules may hand over a plain tuple
        return self.log_odds(mentions) + unsureness(edit_probs) - self.logit_offset[edits].float()

    def marks(self, ids: Tensor) -> TokenMarks | None:
        """Return the marks of tokens (n,), if the gate uses any."""
        if not self._marked_by:
            return None
        return TokenMarks.of(ids, {name: getattr(self, name.removeprefix("request_gate.")) for name in self._marked_by})

    def log_odds(self, mentions: Mentions) -> Tensor:
        """Return the log-odds that prompts ask what they mention: (B,)."""
        return log_odds({name: getattr(self, name.removeprefix("request_gate.")) for name in REQUEST_GATE}, mentions)


def unsureness(edit_probs: Tensor) -> Tensor:
    """Return how far log-odds of probabilities (B,) are below ``_SURE``, times ``_UNSURE_WEIGHT``: 0 or less (B,).

    It is added to the gate's log-odds: the less likely a prompt means an edit, the more clearly it must ask. Another
    question on an edit's subject asks as clearly as its own; only how well it has the relation tells them apart.
    """
    return _UNSURE_WEIGHT * (edit_probs.logit(eps=1e-6) - _SURE).clamp(max=0)


def log_odds(
    weights: Mapping[str, Tensor],
    mentions: Mentions,
    dropout: Callable[[Tensor], Tensor] = lambda values: values,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """Return the log-odds that prompts ask for the edits that they mention: (B,).

    Args:
        weights: all of ``REQUEST_GATE``, of any precision.
        dropout: what leaves out some values while the gate is learned.
        linear: what multiplies values by weights and adds a bias, as ``F.linear`` does; all but the last products.
    """
    read, attend, value, mix, out = (weights[name].float() for name in REQUEST_GATE)

    def applied(part: Tensor, values: Tensor) -> Tensor:
        return linear(values, part[:, :-1], part[:, -1])

    mention_index = mentions.mention_index
    inputs = torch.cat([dropout(applied(read, mentions.states)), mentions.features], -1)
    # One product of both, which takes less time than two.
    attended, values = applied(torch.cat([attend, value]), inputs).split([len(attend), len(value)], -1)  # (N, H)
    highest = attended.new_full((mentions.size, len(attend)), -torch.inf)
    highest = highest.scatter_reduce(0, mention_index[:, None].expand_as(attended), attended.detach(), "amax")
    shares = (attended - highest.index_select(0, mention_index)).exp()
    whole = torch.zeros_like(highest).index_add(0, mention_index, shares)
    shares = shares / whole.index_select(0, mention_index)
    weighted = shares[..., None] * values.relu().unflatten(-1, (len(attend), -1))  # (N, H, v)
    pooled = values.new_zeros(mentions.size, len(value)).index_add(0, mention_index, weighted.flatten(1))
    mixed = applied(mix, dropout(pooled)).relu()
    return F.linear(mixed, out[:, :-1], out[:, -1])[:, 0]


def mention_features(requests: Sequence[Request]) -> list[Mention]:
    """Return the tokens around each mention, and those that its request begins and ends with, with their features.

    Args:
        requests: of which all have marks of the same sorts, or none.
    """
    whole = [one.from_first_state() for one in requests]
    cosines = EditCosines.of([one.projected for one in whole], [one.edit_tokens for one in whole])
    earlier = pad_sequence([_earlier(one) for one in whole], batch_first=True)
    place = torch.arange(earlier.shape[1], device=earlier.device)
    distance, behind = place - _middle(cosines), cosines.mask.sum(1, keepdim=True) - 1 - place
    near = distance.abs() <= CONTEXT_RADIUS
    kept = (near | (place < FIRST_TOKENS) | (behind < LAST_TOKENS)) & cosines.mask
    best = cosines.best()
    edges = [torch.log1p(edge.float().clamp(0, _EDGE)) / 4 for edge in (behind, place.expand_as(behind))]
    signs = [(distance / 10).clamp(-_TENS, _TENS), (distance / 10).abs().clamp(max=_TENS)]
    every = torch.stack([*best, torch.maximum(*best), *signs, *edges, near.float(), earlier.float()], -1)
    features = [every, _match_quality(cosines)[:, None].expand(-1, len(place), -1)]
    features += _mark_features(cosines, [one.marks for one in whole if one.marks is not None], earlier)
    joined = torch.cat(features, -1)
    return [
        Mention(one.states[own[: len(one.states)]], row[own]) for one, own, row in zip(whole, kept, joined, strict=True)
    ]


def _earlier(request: Request) -> Tensor:
    """Return which tokens of a request are of turns before the last one (n,)."""
    none = torch.zeros(len(request.states), dtype=torch.bool, device=request.states.device)
    return none if request.earlier is None else request.earlier


def _middle(cosines: EditCosines) -> Tensor:
    """Return the place around which a request has the tokens of an edit best together: (B, 1)."""
    width = 2 * MENTION_RADIUS + 1
    around = [
        F.max_pool1d(one.transpose(1, 2), width, 1, MENTION_RADIUS).transpose(1, 2) if one.shape[2] else one
        for one in cosines.values
    ]
    subject, relation = cosines.edit_means(around)
    match = (subject + relation).masked_fill(~cosines.mask, -torch.inf)
    # Of places with the same neighbours the first one, however their sums are rounded.
    return (match > match.amax(1, keepdim=True) - _ALIKE).long().argmax(1, keepdim=True)


def _match_quality(cosines: EditCosines) -> Tensor:
    """Return how well requests have the tokens of edits' subjects and relations: least and mean of each (B, 4)."""
    best = [one.amax(1) for one in cosines.values]  # (B, t)
    least = [
        one.where(real, 1.0).amin(1) * real.any(1) if one.shape[1] else one.sum(1)
        for one, real in zip(best, cosines.edit_mask, strict=True)
    ]
    means = cosines.edit_means([one[:, None] for one in best])
    return torch.stack([least[0], means[0][:, 0], least[1], means[1][:, 0]], -1)


def _mark_features(cosines: EditCosines, marks: Sequence[TokenMarks], earlier: Tensor) -> list[Tensor]:
    """Return what sentences and names have of edits, as far as tokens are marked: (B, n, f) each."""
    if not marks:
        return []
    ends = pad_sequence([one.ends for one in marks], batch_first=True)
    found = [sentence_features(cosines, ends, earlier)]
    starts = [one.starts for one in marks if one.starts is not None]
    if starts:
        found.append(name_features(cosines, pad_sequence(starts, batch_first=True), ends, earlier))
    return found


def batch_mentions(mentions: Sequence[Mention]) -> Mentions:
    """Return several mentions as one batch."""
    sizes = torch.tensor([len(one.states) for one in mentions], device=mentions[0].states.device)
    of = torch.arange(len(mentions), device=sizes.device).repeat_interleave(sizes)
    states, features = (torch.cat([one[part] for one in mentions]).float() for part in (0, 1))
    return Mentions(states, features, of, len(mentions))
