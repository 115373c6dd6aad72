"""How edits are split over shards."""

import math
from itertools import pairwise

from wisecli.errors import SettingsError


def split_edits(count: int, *, shards: int | None, edits_per_shard: int) -> list[range]:
    """Deal ``count`` edits, in order, to shards of like size.

    Args:
        shards: how many; if not given, as few as hold ``edits_per_shard`` each.

    Raises:
        SettingsError: more shards than edits.
    """
    wanted = shards if shards is not None else math.ceil(count / edits_per_shard)
    if wanted > count:
        raise SettingsError(f"--set shards={wanted} is more than the {count} edits; every shard needs at least one")
    bounds = [round(index * count / wanted) for index in range(wanted + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]
