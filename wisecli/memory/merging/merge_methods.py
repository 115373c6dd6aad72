"""Merges the deltas of several shards into one: one decorated pure function for each method.

Every method takes deltas stacked (n, d, d_ff) and a recipe, and returns the merged ``Δ`` (d, d_ff), before the recipe's
scale λ. ``ties`` is the paper's choice (section 2.3.2): trim, elect sign, disjoint merge (arXiv 2306.01708).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.errors import SettingsError
from wisecli.registry import Registry


@dataclass(frozen=True)
class Recipe:
    """The parameters of a merge.

    ``weights`` (n,) of the deltas; ``density`` the share of each delta's entries that trimming or dropping keeps;
    ``base`` the unedited matrix (d, d_ff), for methods that merge whole weights; ``generator`` for random dropping.
    """

    weights: Tensor
    density: float
    base: Tensor
    generator: torch.Generator


Method = Callable[[Tensor, Recipe], Tensor]
# By the name that ``wise merge --method`` is given.
METHODS: Registry[Method] = Registry("wisecli.merges")
merge_method = METHODS.register


def merge_deltas(name: str, deltas: Tensor, recipe: Recipe, *, scale: float = 1.0) -> Tensor:
    """Merge deltas (n, d, d_ff) by a method's name and scale the result by λ.

    A single delta has nothing to be reconciled with and stays as it is, but for its weight.

    Raises:
        SettingsError: no such method.
    """
    if name not in METHODS:
        raise SettingsError(f"--method {name!r} is unknown; choose one of {', '.join(sorted(METHODS))}")
    merged = deltas[0] * recipe.weights[0] if len(deltas) == 1 else METHODS[name](deltas, recipe)
    return scale * merged


@merge_method("ties")
def ties(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Trim each delta to its largest entries, elect a sign per entry, average those that agree with it."""
    return disjoint_mean(trim(deltas, recipe.density), recipe.weights)


@merge_method("sign")
def sign(deltas: Tensor, recipe: Recipe) -> Tensor:
    """TIES without the trimming."""
    return disjoint_mean(deltas, recipe.weights)


@merge_method("linear")
def linear(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Return the weighted sum of the deltas (task arithmetic)."""
    return torch.einsum("n,nij->ij", recipe.weights, deltas)


@merge_method("magnitude")
def magnitude(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Trim each delta to its largest entries and sum."""
    return linear(trim(deltas, recipe.density), recipe)


@merge_method("dare")
def dare(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Drop entries at random, rescale the rest, and sum (Yu et al., arXiv 2311.03099)."""
    return linear(drop(deltas, recipe), recipe)


@merge_method("dare-ties")
def dare_ties(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Drop entries at random, rescale the rest, then elect signs and average as TIES does."""
    return disjoint_mean(drop(deltas, recipe), recipe.weights)


@merge_method("slerp")
def slerp(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Walk the great circle between whole matrices ``W + Δ``, each by its weight's share of those so far."""
    merged, total = recipe.base + deltas[0], recipe.weights[0]
    for delta, weight in zip(deltas[1:], recipe.weights[1:], strict=True):
        total = total + weight
        merged = spherical(merged, recipe.base + delta, float(weight / total))
    return merged - recipe.base


def trim(deltas: Tensor, density: float) -> Tensor:
    """Keep the ``int(density · size)`` entries of largest magnitude of each delta (n, d, d_ff)."""
    kept = int(density * deltas[0].numel())
    flat = deltas.flatten(1)
    largest = flat.abs().topk(kept, dim=1).indices
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest)).view_as(deltas)


def drop(deltas: Tensor, recipe: Recipe) -> Tensor:
    """Keep each entry with probability ``density`` and divide it by that."""
    kept = torch.rand(deltas.shape, generator=recipe.generator) < recipe.density
    return deltas * kept / recipe.density


def disjoint_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Elect the sign of each entry's sum, then average the weighted entries of that sign alone (section 2.3.2)."""
    elected = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = deltas.sign() == elected
    total = torch.einsum("n,nij->ij", weights, deltas * agreeing)
    return total / agreeing.sum(0).clamp(min=1)


def spherical(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Interpolate two matrices, taken as vectors, on a great circle; linearly where they are parallel."""
    cosine = torch.dot(first.flatten(), second.flatten()) / (first.norm() * second.norm()).clamp(min=1e-12)
    angle = torch.arccos(cosine.double().clamp(-1, 1))
    if angle < 1e-6:
        return torch.lerp(first, second, share)
    weights = torch.sin(torch.stack([(1 - share) * angle, share * angle])) / torch.sin(angle)
    return (weights[0] * first + weights[1] * second).to(first.dtype)
