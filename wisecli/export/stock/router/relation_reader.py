"""A relation reader: which relation a text asks, as attention with constant queries pools it from tokens' states.

With ``u`` the normed state of a token behind the router's layer and ``ν`` what a norm multiplies the stream by there::

    y = [ν W₂ silu(W₁ u + b₁); P (u - m)]     features of a token, and principal components of its state
    k = K y + b,   v = V y                    keys and values, rotated as the model rotates its own
    (r, a) = O · attention(q, k, v)           a code of the relation, and whether it is asked

``q`` is the same at every token, so tokens after a question go on pooling it. An edit's relation is asked by as much
as ``κ r·ρ + a - τ``, where ``ρ`` is the mean code of its own prompt in the forms that are trained, of length 1. All of
it is what two decoder blocks of Llama's kind compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.export.stock.text_states import Rotation, TextStates

# Tokens whose components are found at once.
_TOGETHER = 65536


@dataclass(frozen=True)
class ReaderSizes:
    """Sizes of a reader: of the stream's states, of its ``features`` a token and the ``neurons`` behind them, how many
    principal ``components`` of states it reads, of its attention, and of the ``code`` of a relation.

    Its attention is some ``groups`` of keys and values of the model's own, with ``heads`` queries each.
    """

    hidden: int
    features: int
    neurons: int
    components: int
    groups: int
    heads: int
    head_dim: int
    code: int


class RelationReader(nn.Module):
    """See the module; the norm's factors ν are multiplied by a ``gain`` to be around 1."""

    gain: Tensor
    mean: Tensor
    components: Tensor

    def __init__(self, sizes: ReaderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        wide = sizes.groups * sizes.head_dim
        self.neurons = nn.Linear(sizes.hidden, sizes.neurons)
        self.features = nn.Linear(sizes.neurons, sizes.features, bias=False)
        self.keys = nn.Linear(sizes.features + sizes.components, wide)
        self.values = nn.Linear(sizes.features + sizes.components, wide, bias=False)
        self.queries = nn.Parameter(torch.randn(sizes.groups, sizes.heads, sizes.head_dim) / 2)
        self.output = nn.Linear(sizes.heads * wide, sizes.code + 1, bias=False)
        self.kappa = nn.Parameter(torch.tensor(2.0))
        self.threshold = nn.Parameter(torch.tensor(4.0))
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(sizes.hidden))
        self.register_buffer("components", torch.zeros(sizes.hidden, sizes.components))

    def fit_to(self, states: Tensor, inverse: Tensor) -> None:
        """Let the reader look at principal components of normed states (n, d), and at norms' factors (n,)."""
        mean = states.mean(0)
        values, vectors = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
        count = self.sizes.components
        self.mean.copy_(mean)
        self.components.copy_(vectors[:, -count:].flip(1) / values[-count:].clamp(min=0).sqrt().mean())
        self.gain.fill_(1 / float(inverse.median()))

    def token_features(self, states: Tensor, inverse: Tensor) -> Tensor:
        """Return the features (n, f) of normed states (n, d), which the norm had multiplied by ``inverse`` (n,)."""
        return torch.cat([self.learned_features(states, inverse), self._projected(states)], -1)

    def learned_features(self, states: Tensor, inverse: Tensor) -> Tensor:
        """Return the learned features of states (n, d), without the principal components."""
        found: Tensor = self.features(F.silu(self.neurons(states))) * (inverse * self.gain)[:, None]
        return found

    def components_of(self, states: TextStates) -> Tensor:
        """Return the principal components (n, c) of all tokens' states, in half precision."""
        return torch.cat([self._projected(part.float()).half() for part in states.normed.split(_TOGETHER)])

    def _projected(self, states: Tensor) -> Tensor:
        return (states - self.mean) @ self.components

    def pooled(self, features: Tensor, mask: Tensor, columns: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return codes (B, c), and whether anything is asked (B,), at one column (B,) of each row.

        Args:
            features: of tokens (n, f), row after row: those that there are by the ``mask`` (B, T).
        """
        row, place = mask.nonzero().unbind(1)
        seen = place <= columns[row]
        row, behind, features = row[seen], (columns[row] - place)[seen], features[seen]
        keys = self.keys(features).unflatten(-1, (self.sizes.groups, self.sizes.head_dim))
        # Only how far a key stands before the column matters: it is rotated back by that, and queries not at all.
        # Some models scale what they rotate, and so both.
        cos, sin = (part.to(keys.dtype)[behind][:, None] for part in (rotation.cos, -rotation.sin))
        back = _rotated(keys, cos, sin) * rotation.cos[0, 0]
        # Where products are in bfloat16, exponents and sums are not.
        scores = torch.einsum("ghd,ngd->ngh", self.queries, back).float() * rotation.scaling
        weights = _softmax(scores, row, len(mask))[..., None] * self._values(features)
        heads = weights.new_zeros(len(mask), self.output.in_features).index_add(0, row, weights.flatten(1))
        found = self.output(heads)
        return found[:, :-1], found[:, -1]

    def _values(self, features: Tensor) -> Tensor:
        """Return the values (n, g, 1, h) of tokens, the same for all heads of a group."""
        values: Tensor = self.values(features).unflatten(-1, (self.sizes.groups, 1, self.sizes.head_dim))
        return values

    def odds(self, codes: Tensor, asked: Tensor, relations: Tensor) -> Tensor:
        """Return the log odds (n, e) that texts of some codes (n, c) ask relations (e, c)."""
        return self.kappa * codes @ relations.T + asked[:, None] - self.threshold


def _softmax(scores: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return weights (n, g, h) of tokens from their scores (n, g, h), which add up to 1 in each row (n,)."""
    index = row[:, None, None].expand_as(scores)
    most = scores.new_full((rows, *scores.shape[1:]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - most[row]).exp()
    return weights / torch.zeros_like(most).index_add(0, row, weights)[row]


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = vectors.chunk(2, -1)
    return vectors * cos + torch.cat([-second, first], -1) * sin
