"""Masks as they are drawn for shards, at random or apart from each other."""

import torch

from wisecli.artifacts.shard import Mask, MaskKind
from wisecli.errors import SettingsError
from wisecli.models.layout.site import Site

# How far the seeds of two shards' masks lie apart: no two seeds that a user gives are likely to.
_APART = 1_000_003


def random_mask(site: Site, density: float, kind: MaskKind, generator: torch.Generator) -> Mask:
    """Return a mask of exactly ``round(density · size)`` places, drawn without replacement (section 2.3.2: ρ).

    Two masks overlap in an expected share ρ² of the matrix, k of them in ρᵏ.
    """
    size = _size(site, kind)
    count = max(1, round(density * size))
    indices = torch.randperm(size, generator=generator)[:count].sort().values
    return Mask(kind, indices, site.d, site.width)


def draw_mask(
    site: Site, density: float, kind: MaskKind, *, number: int, count: int, disjoint: bool, seed: int
) -> Mask:
    """Return the mask of one of ``count`` shards, the same whether or not the others are drawn.

    Raises:
        SettingsError: ``count`` disjoint masks do not fit the matrix.
    """
    if disjoint:
        return disjoint_masks(site, density, kind, count, torch.Generator().manual_seed(seed))[number]
    return random_mask(site, density, kind, torch.Generator().manual_seed(seed + _APART * number))


def disjoint_masks(site: Site, density: float, kind: MaskKind, count: int, generator: torch.Generator) -> list[Mask]:
    """Masks like :func:`random_mask` that share no place.

    Raises:
        SettingsError: ``count`` of them do not fit the matrix.
    """
    size = _size(site, kind)
    places = max(1, round(density * size))
    if places * count > size:
        raise SettingsError(
            f"{count} disjoint masks of --set mask_ratio={density:g} do not fit one matrix; "
            f"give --set mask_ratio={size // count / size:.3g} or less"
        )
    drawn = torch.randperm(size, generator=generator)[: places * count].split(places)
    return [Mask(kind, indices.sort().values, site.d, site.width) for indices in drawn]


def _size(site: Site, kind: MaskKind) -> int:
    """Return how many places a mask is drawn from."""
    return site.width if kind == "columns" else site.d * site.width
