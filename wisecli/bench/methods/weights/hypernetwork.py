"""MEND's editor network: the two factors of a token's gradient → those of its pseudo-gradient (Mitchell et al. 2022).

For a matrix ℓ, with u the token's key, δ the gradient at what the matrix gives and z = norm(u ⊕ δ) (section 3.2):

    h = z + σ(s¹_ℓ ⊙ (U₁ V₁ z + b) + o¹_ℓ)        g_ℓ(z) = h + σ(s²_ℓ ⊙ (U₂ V₂ h) + o²_ℓ)

σ is the positive part. U, V and b are shared by all matrices of one shape, scales s and shifts o are each one's own.
What the network adds to z is brought back to the units of (u, δ) and added to them, so that, as U, b and o are zero
before training, the pseudo-gradient is then the gradient itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wisecli.bench.methods.weights.gradient_factors import Factors
from wisecli.models.layout.site import MatrixSite

# A dimension's standard deviation counts as no less than this share of their mean: some keys hardly ever move.
_LEAST_SPREAD = 1e-2


class LowRankLayer(nn.Module):
    """``x + σ(s ⊙ (U V x + b) + o)``, with s and o by matrix; ``b`` only where wanted."""

    def __init__(self, width: int, matrices: int, rank: int, generator: torch.Generator, *, bias: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(width, rank))
        self.right = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.scale = nn.Parameter(torch.ones(matrices, width))
        self.shift = nn.Parameter(torch.zeros(matrices, width))

    def forward(self, inputs: Tensor, index: int) -> Tensor:
        """Return the layer's output for inputs (n, width), in the same shape.

        Args:
            index: which of the matrices the tokens are of.
        """
        inner = inputs @ self.right.T @ self.left.T
        if self.bias is not None:
            inner = inner + self.bias
        # Not relu(), which has no gradient at zero: all are zero there while U is, and no step would ever be made.
        return inputs + (self.scale[index] * inner + self.shift[index]).clamp(min=0)


class Hypernetwork(nn.Module):
    """The network for matrices (d, d_ff) of one shape.

    Args:
        matrices: how many there are.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self, d: int, d_ff: int, matrices: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.split, width = (d_ff, d), d_ff + d
        self.first = LowRankLayer(width, matrices, rank, generator, bias=True)
        self.second = LowRankLayer(width, matrices, rank, generator, bias=False)
        self.register_buffer("middle", torch.zeros(matrices, width))
        self.register_buffer("spread", torch.ones(matrices, width))

    def normalise(self, keys: Tensor, gradients: Tensor, index: int) -> None:
        """Set a matrix' mean and standard deviation, by dimension, from keys (n, d_ff) and gradients (n, d)."""
        joined = torch.cat([keys, gradients], -1)
        self.middle[index] = joined.mean(0)
        parts = joined.std(0).split(self.split)
        smallest = torch.finfo(joined.dtype).tiny
        self.spread[index] = torch.cat(
            [part.clamp(min=max(_LEAST_SPREAD * float(part.mean()), smallest)) for part in parts]
        )

    def forward(self, keys: Tensor, gradients: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return ũ (n, d_ff) and δ̃ (n, d) of tokens' u and δ."""
        start = (torch.cat([keys, gradients], -1) - self.middle[index]) / self.spread[index]
        added = self.spread[index] * (self.second(self.first(start, index), index) - start)
        to_keys, to_slopes = added.split(self.split, -1)
        return keys + to_keys, gradients + to_slopes


class Editor(nn.Module):
    """A network for each shape that matrices have, and the learned rate α of each matrix.

    Args:
        rate: α before training.
    """

    def __init__(self, sites: Sequence[MatrixSite], rank: int, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        shapes = [(site.d, site.d_ff) for site in sites]
        kinds = list(dict.fromkeys(shapes))
        self.networks = nn.ModuleList(Hypernetwork(*kind, shapes.count(kind), rank, generator) for kind in kinds)
        # Of each matrix: its network, and which of that network's matrices it is.
        self._own = [(kinds.index(shape), shapes[:index].count(shape)) for index, shape in enumerate(shapes)]
        self.log_rates = nn.Parameter(torch.full((len(sites),), rate).log())

    def normalise(self, seen: Sequence[Factors], index: int) -> None:
        """Set a matrix' mean and standard deviation to those of the tokens seen."""
        network, own = self._network(index)
        network.normalise(torch.cat([part.keys for part in seen]), torch.cat([part.gradients for part in seen]), own)

    def forward(self, factors: Factors, index: int) -> tuple[Tensor, Tensor]:
        """Return α ũ (B, T, d_ff) and δ̃ (B, T, d) for one matrix; zero where there is padding."""
        network, own = self._network(index)
        keys, gradients = network(factors.keys, factors.gradients, own)
        return factors.padded(self.log_rates[index].exp() * keys), factors.padded(gradients)

    def _network(self, index: int) -> tuple[Hypernetwork, int]:
        number, own = self._own[index]
        network = self.networks[number]
        assert isinstance(network, Hypernetwork)
        return network, own
