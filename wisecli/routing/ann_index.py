"""For very large lookups: the nearest key found by an approximate index (faiss) instead of by comparing with all.

An exported checkpoint needs nothing but torch and compares with all keys; the index serves evaluation and generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from wisecli.routing.prompts import UNROUTED
from wisecli.routing.scores import INSIDE, MemoryScores

# Up to here comparing with all keys costs less than looking them up.
INDEXED_ABOVE = 10_000
# Lists per √n keys, and the share of them that a search looks into.
_LISTS, _SEARCHED = 1.0, 0.25
# Keys that are looked through for the first whose edit's subject the prompt names.
_SEARCHED_FOR = 256


@dataclass(frozen=True)
class NearestKey:
    """Finds, for each key, the nearest routing key: one index for each whitening, and the places of its probes."""

    indices: tuple[Any, ...]
    places: tuple[Tensor, ...]

    def __call__(self, routed: MemoryScores, keys: Tensor, named: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`~wisecli.routing.scores.MemoryScores.nearest` of a lookup: (..., d_ff) → two (...).

        With ``named``, of so many of the nearest keys as are searched for the first whose edit's subject is named.
        """
        flat = keys.reshape(-1, keys.shape[-1]).float().cpu()
        lengths = routed.lengths(flat.to(routed.probes.device)).cpu()
        threshold = routed.thresholds[0]  # all edits', see below
        best, chosen = torch.full((len(flat),), -torch.inf), torch.full((len(flat),), UNROUTED)
        for number, (index, places) in enumerate(zip(self.indices, self.places, strict=True)):
            if routed.routing == "sequence" and number == INSIDE:
                continue
            asked = torch.cat([flat, lengths[:, number, None]], dim=1).numpy()
            found, rows = (torch.from_numpy(array) for array in index.search(asked, _searched(named)))
            if named is not None:
                found, rows = _first_named(routed, found, rows, places, named.expand(*keys.shape[:-1], -1))
            row = rows[:, 0]
            place, cosine = places[row.clamp(min=0)], found[:, 0] / lengths[:, number]
            strength = cosine / threshold
            nearer = (strength > best) & (row >= 0)
            best, chosen = strength.where(nearer, best), place.where(nearer, chosen)
        best, chosen = (found.view(keys.shape[:-1]).to(keys.device) for found in (best, chosen))
        return best, chosen


def _searched(named: Tensor | None) -> int:
    return 1 if named is None else _SEARCHED_FOR


def _first_named(
    routed: MemoryScores, found: Tensor, rows: Tensor, places: Tensor, named: Tensor
) -> tuple[Tensor, Tensor]:
    """Of search results (N, k), nearest first, the first that may open, (N, 1) twice; row -1 for none.

    Args:
        named: the edits whose subjects the prompts name (..., M), N in all.
    """
    place = places[rows.clamp(min=0)].to(routed.owner.device)
    allowed = ~routed.asks[place] | named.reshape(len(rows), -1).gather(1, routed.owner[place])
    allowed = allowed.cpu() & (rows >= 0)
    first = allowed.int().argmax(-1, keepdim=True)
    return found.gather(1, first), rows.gather(1, first).where(allowed.any(-1, keepdim=True), UNROUTED)


def build_index(routed: MemoryScores) -> NearestKey | None:
    """An index for a lookup of more than ``INDEXED_ABOVE`` keys, where faiss is installed (the extra ``index``).

    There is none for edits with thresholds of their own: the nearest key need not be the one furthest above its own.
    """
    if routed.kind != "lookup" or len(routed.probes) <= INDEXED_ABOVE or find_spec("faiss") is None:
        return None
    if len(set(routed.thresholds)) > 1:
        return None
    import faiss

    indices, places = [], []
    for number in range(len(routed.floors)):
        own = routed.metric == number
        # A routing key's offset counts as one more coordinate, along which a key is as long as the key itself.
        probes = torch.cat([routed.probes[own], routed.offset[own, None]], dim=1).float().cpu().numpy()
        lists = max(1, min(int(_LISTS * len(probes) ** 0.5), len(probes) // 39))
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(probes.shape[1]), probes.shape[1], lists, faiss.METRIC_INNER_PRODUCT
        )
        index.train(probes)
        index.add(probes)
        index.nprobe = max(1, round(_SEARCHED * lists))
        indices.append(index)
        places.append(own.nonzero().flatten().cpu())
    return NearestKey(tuple(indices), tuple(places))
