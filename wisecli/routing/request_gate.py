"""Whether a prompt asks the edit that it mentions. Needs torch only; exports carry this very file.

Late interaction finds an edit's words in a prompt; it does not see what the prompt wants with them. A prompt that has a
question translated, that asks it of another time, or that holds it in a document mentions the edit and asks something
else. So the tokens around the mention are pooled by attention, each with how well the edit explains it:

    c      = argmax_c Σ_t max_{|s - c| ≤ SPREAD} cos(z(e_t), z(q_s))        the middle of the mention
    u_s    = [R x_s + b ; cos with the edit's subject, its relation, either ; places]       |s - c| ≤ NEAR
    log-odds = out · [Σ_s softmax_s(A_h u_s) relu(V_h u_s)]_h               h: heads

One gate serves all edits of a base model: what tells a request from a mention does not depend on the fact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Tensors of the gate that are learned; the last column of each is added.
REQUEST = ("request.read", "request.attend", "request.value", "request.out")
# The log-odds that a prompt must exceed to ask an edit, of each edit.
BARS = "request.bars"
# How far around its middle the words of a mention may lie, and the tokens around it that are read.
SPREAD, NEAR = 10, 40
# How many before it, where it lies further into a text than that.
_BEFORE = 8
# What is known of a token besides its state.
FEATURES = 7
# Places count in tens, up to so many; distances to the ends of what is asked up to so many tokens.
_TENS, _EDGE = 4.0, 16.0


class Mention(NamedTuple):
    """The tokens around a mention: their states (n, d), and ``FEATURES`` numbers of each (n, f)."""

    states: Tensor
    features: Tensor


class Mentions(NamedTuple):
    """Several of them, padded on the right: (B, n, d), (B, n, f), and which tokens are there (B, n)."""

    states: Tensor
    features: Tensor
    there: Tensor


class RequestGate(nn.Module):
    """The gate with its tensors, which become buffers.

    ``read`` (r, d + 1), ``attend`` (H, r + f + 1), ``value`` (H · v, r + f + 1), ``out`` (1, H · v + 1), ``bars`` (M,).

    Args:
        tensors: all of ``REQUEST``, and ``BARS``.
    """

    read: Tensor
    attend: Tensor
    value: Tensor
    out: Tensor
    bars: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in (*REQUEST, BARS):
            self.register_buffer(name.removeprefix("request."), tensors[name].float())

    def forward(self, mentions: Mentions, edits: Tensor) -> Tensor:
        """The log-odds that prompts ask the edits (B,) that they mention, above the bars of those: (B,)."""
        return self.log_odds(mentions) - self.bars[edits].float()

    def log_odds(self, mentions: Mentions) -> Tensor:
        """The log-odds that prompts ask what they mention: (B,)."""
        return log_odds({name: getattr(self, name.removeprefix("request.")).float() for name in REQUEST}, mentions)


def log_odds(
    weights: Mapping[str, Tensor], mentions: Mentions, dropped: Callable[[Tensor], Tensor] = lambda values: values
) -> Tensor:
    """The log-odds that prompts ask what they mention: (B,).

    Args:
        weights: all of ``REQUEST``.
        dropped: what leaves out some values while the gate is learned.
    """
    read, attend, value, out = (weights[name] for name in REQUEST)
    seen = torch.cat([dropped(_applied(read, mentions.states)), mentions.features], -1)
    shares = _applied(attend, seen).masked_fill(~mentions.there[..., None], -1e9).softmax(1)  # (B, n, H)
    values = _applied(value, seen).relu().unflatten(-1, (len(attend), -1))  # (B, n, H, v)
    pooled = (shares[..., None] * values).sum(1).flatten(1)
    return _applied(out, dropped(pooled))[:, 0]


def _applied(weights: Tensor, values: Tensor) -> Tensor:
    return F.linear(values, weights[:, :-1], weights[:, -1])


def mention_in(states: Tensor, turned: Tensor, subject: Tensor, relation: Tensor) -> Mention:
    """The tokens of a request around the mention of an edit.

    Args:
        states: of the tokens of the request (n, d).
        turned: the same under both projections, of length 1 (2, n, k).
        subject, relation: tokens of the edit's own prompt under the first projection and the second, (t, k).
    """
    cosines = [own @ part.T for own, part in zip(turned, (subject, relation), strict=True)]
    found = torch.cat([one / max(1, one.shape[1]) for one in cosines], 1)
    # For each place the best of its neighbours, for every token of the edit.
    around = F.max_pool1d(found.T[None], 2 * SPREAD + 1, 1, SPREAD)[0].sum(0)
    middle, count = int(around.argmax()), len(states)
    # Far into a text it is the sentence itself that counts, not what the text is before it.
    first = max(0, middle - NEAR) if middle <= NEAR else middle - _BEFORE
    last = min(count, middle + NEAR + 1)
    own = [one.amax(1) if one.shape[1] else one.new_zeros(count) for one in cosines]
    place = torch.arange(count, device=states.device, dtype=torch.float32)
    away = (place - middle) / 10
    edges = [torch.log1p(edge.clamp(max=_EDGE)) / 3 for edge in (count - 1 - place, place)]
    signs = [away.clamp(-_TENS, _TENS), away.abs().clamp(max=_TENS)]
    features = torch.stack([*own, torch.maximum(*own), *signs, *edges], -1)
    return Mention(states[first:last].float(), features[first:last])


def padded(mentions: list[Mention]) -> Mentions:
    """Several mentions as one batch."""
    states, features = (nn.utils.rnn.pad_sequence([one[part] for one in mentions], batch_first=True) for part in (0, 1))
    lengths = torch.tensor([len(one.states) for one in mentions], device=states.device)
    return Mentions(states, features, torch.arange(states.shape[1], device=states.device) < lengths[:, None])
