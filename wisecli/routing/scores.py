"""What a side memory holds, and its router's scores. Needs torch only; exports carry this very file.

The score of a memory for a key ``a`` is its activation ``‖Δ_m a‖₂`` (router ``norm``; WISE, arXiv 2405.14768,
equation 3), if ``activated`` ``‖σ(W a + Δ_m a) - σ(W a)‖₂`` with the model's activation function σ, or the cosine of
``a`` with the nearest key of an edit, both whitened (router ``key``). Of several memories the one whose score exceeds
its threshold by the largest factor answers (section 2.3.2, WISE-Retrieve). A lookup counts every edit as a memory of
its own. With router ``meaning`` a prompt's tokens say which edit of a lookup answers it (see
:mod:`~wisecli.routing.meaning`), and keys only where it answers, and which residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .meaning import MEANING, Meaning
from .names import NAMED, NAMED_AND_MEANT, NAMES, Names
from .prompts import UNROUTED
from .request_gate import BARS, REQUEST, RequestGate
from .spelling import SPELLING, Spelling

# The whitening of keys inside answers; those that prompts end in have others.
INSIDE = 1
# How near a key inside an answer must come once a prompt has opened a lookup for the whole row.
REACH = 0.5
_SETTINGS = ("router", "routing", "kind", "sharpness")
# Settings that only some memories have.
_OPTIONAL = ("reads", "activated")
# What a description may allocate: these types, and so many numbers a tensor.
_TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
_LARGEST = 2**36


@dataclass(frozen=True)
class SideMemory:
    """M side memories of one matrix and what routes to them.

    ``tensors`` of kind ``matrix``: ``columns`` (M, k) the input coordinates each memory reads; ``delta`` (M, d, k) its
    change ``Δ`` there. Of kind ``lookup``: ``values`` (m, d) the residuals; ``value`` (n,) the one each key adds. With
    router ``key`` also ``probes`` (n, d_ff), each edit's key e as ``P e / √(eᵀP e)``, times what together with the
    ``offset`` (n,) lets all share one threshold; ``owner`` (n,) the memory it belongs to; ``metric`` (n,) the whitening
    it is seen through, of those that ``directions`` (w, r, d_ff), ``gains`` (w, r) and ``floors`` (w,) make up:
    ``P = floor · I + directionsᵀ diag(gains) directions``. A lookup may hold ``NAMES`` besides: those of its keys that
    ``asks`` (n,) marks open for prompts that name their edit's subject. With router ``meaning`` it holds ``MEANING``
    besides, and ``NAMES`` without ``asks``, compared with the states that leave layer ``reads``. With ``NAMES`` it may
    hold ``SPELLING``, so that a slip in a name does no harm; with ``REQUEST`` prompts must ask what they mention.

    ``routing``: ``token`` decides at every token by itself; ``sequence`` at a row's last prompt token, for all that
    follows (of a lookup, whether it answers, by the keys that prompts end in; each token after it takes the nearest key
    inside an answer, be it less near than a token by itself would have to be). ``sharpness`` β > 0 lets a lookup
    add the mean of all residuals, weighted by ``softmax(β · score)``; 0 adds the nearest key's alone.
    """

    tensors: Mapping[str, Tensor]
    thresholds: tuple[float, ...]
    router: str = "norm"
    routing: str = "token"
    kind: str = "matrix"
    sharpness: float = 0.0
    reads: int | None = None
    activated: bool | None = None

    def describe(self) -> dict[str, Any]:
        """All but the tensors, with their shapes and types, as JSON."""
        layout = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in self.tensors.items()}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return {"thresholds": list(self.thresholds), **settings, "tensors": layout}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> SideMemory:
        """The inverse of :meth:`describe`; tensors that are not given are allocated, to be loaded later.

        Raises:
            ValueError: the description asks for tensors that no memory has.
        """
        if tensors is None:
            layout = described["tensors"].items()
            tensors = {name: _allocated(name, dtype, shape) for name, (dtype, *shape) in layout}
        settings = {name: described[name] for name in _SETTINGS}
        settings |= {name: described[name] for name in _OPTIONAL if name in described}
        return cls(tensors, tuple(described["thresholds"]), **settings)


def _allocated(name: str, dtype: str, shape: list[int]) -> Tensor:
    size = 1
    for dimension in shape:
        size = size * dimension if type(dimension) is int and dimension >= 0 else _LARGEST + 1
    if dtype not in _TYPES or size > _LARGEST:
        raise ValueError(f"the memory's description of tensor {name} cannot be right: {str([dtype, *shape])[:80]}")
    kind: torch.dtype = getattr(torch, dtype)
    # What nobody loads after all is found by this; see :mod:`.serving`.
    return torch.full(shape, torch.nan, dtype=kind) if kind.is_floating_point else torch.empty(shape, dtype=kind)


# Finds for keys what :meth:`MemoryScores.nearest` finds.
Search = Callable[["MemoryScores", Tensor, Tensor | None], tuple[Tensor, Tensor]]


class MemoryScores(nn.Module):
    """The tensors of side memories as buffers, and how strongly each memory is called by a key.

    ``index`` stands in for comparing a key with all keys of a large lookup; see :mod:`wisecli.routing.ann_index`.

    Args:
        memory: the side memories; their tensors keep their names.
    """

    columns: Tensor
    delta: Tensor
    probes: Tensor
    owner: Tensor
    offset: Tensor
    metric: Tensor
    directions: Tensor
    gains: Tensor
    floors: Tensor
    asks: Tensor
    values: Tensor
    value: Tensor

    def __init__(self, memory: SideMemory) -> None:
        super().__init__()
        for name, tensor in memory.tensors.items():
            if name not in (*NAMES, *MEANING, *SPELLING, *REQUEST, BARS):
                # Half precision is for keeping: squared norms of keys overflow it.
                self.register_buffer(name, tensor.float() if tensor.dtype == torch.float16 else tensor)
        edits = len(memory.thresholds)
        least = NAMED_AND_MEANT if memory.router == "meaning" else NAMED
        self.names = Names(memory.tensors, edits, least) if NAMES[0] in memory.tensors else None
        self.meaning = Meaning(memory.tensors, edits) if memory.router == "meaning" else None
        slips = self.names is not None and SPELLING[0] in memory.tensors
        self.spelling = Spelling(memory.tensors) if slips else None
        self.request = RequestGate(memory.tensors) if REQUEST[0] in memory.tensors else None
        self.thresholds, self.router, self.routing = memory.thresholds, memory.router, memory.routing
        self.kind, self.sharpness, self.reads = memory.kind, memory.sharpness, memory.reads
        self.index: Search | None = None

    def nearest(self, keys: Tensor, named: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The best score of each token as a multiple of its threshold, and where: (..., d_ff) → two (...).

        The place is a memory, or of a lookup one of its keys; where prompts decide, one that prompts end in.

        Args:
            named: the edits whose subjects the prompts name (..., M), if keys that ask for that are to be left out.
        """
        if self.index is not None:
            return self.index(self, keys, named)
        if self.kind != "lookup":
            return self.strongest(self.scores(keys))
        cosines = self.cosines(keys)
        strengths = self._opening(cosines) / self._limits(cosines.device, of_keys=True)
        if named is not None:
            strengths = strengths.masked_fill(self.asks & ~named[..., self.owner], -torch.inf)
        strength, place = strengths.max(-1)
        return strength, place

    def beyond(self, scores: Tensor) -> Tensor:
        """Which memories' thresholds scores (..., M) exceed: (..., M)."""
        return scores > self._limits(scores.device)

    def _opening(self, cosines: Tensor) -> Tensor:
        """Cosines (..., n) with those keys that can open a memory: not a lookup's inside answers if prompts decide."""
        if self.routing == "token" or self.kind != "lookup":
            return cosines
        return cosines.masked_fill(self.metric == INSIDE, -torch.inf)

    def memory_at(self, chosen: Tensor) -> Tensor:
        """The memory that each place belongs to: (...) → (...)."""
        if self.kind != "lookup":
            return chosen
        return self.owner[chosen.clamp(min=0)].where(chosen != UNROUTED, UNROUTED)

    def scores(self, keys: Tensor) -> Tensor:
        """Score of every memory for every key: (..., d_ff) → (..., M)."""
        if self.router == "norm":
            memories = range(len(self.thresholds))
            return torch.stack([torch.linalg.vector_norm(self.change(keys, m), dim=-1) for m in memories], dim=-1)
        cosine = self._opening(self.cosines(keys))
        if len(self.thresholds) == 1:
            return cosine.amax(-1, keepdim=True)
        best = cosine.new_full((*cosine.shape[:-1], len(self.thresholds)), -torch.inf)
        return best.scatter_reduce(-1, self.owner.expand_as(cosine), cosine, "amax")

    def cosines(self, keys: Tensor, places: Tensor | None = None) -> Tensor:
        """Whitened cosine of every key with every routing key, made comparable among those: (..., d_ff) → (..., n).

        Args:
            places: the routing keys that are wanted (n,); all by default.
        """
        wide = keys.float()  # squared norms of keys overflow half precision
        kept = (self.probes, self.metric, self.offset)
        probes, metric, offset = kept if places is None else (each[places] for each in kept)
        return F.linear(wide, probes.float()) / self.lengths(wide)[..., metric] + offset.float()

    def of_edits(self, keys: Tensor, edits: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine and place of the nearest key of one edit each: keys (m, d_ff), edits (m,) → two (m,).

        Args:
            inside: whether the key comes after its prompt's last token (m,), and is compared with such alone.
        """
        places = torch.isin(self.owner, edits).nonzero().flatten()
        other = self.owner[places] != edits[:, None]
        other = other | ((self.metric[places] == INSIDE) != inside[:, None])
        cosine, at = self.cosines(keys, places).masked_fill(other, -torch.inf).max(-1)
        return cosine, places[at]

    def lengths(self, keys: Tensor) -> Tensor:
        """``√(aᵀP a)`` of every key under every whitening: (..., d_ff) → (..., w)."""
        along = F.linear(keys, self.directions.flatten(0, 1).to(keys.dtype)).unflatten(-1, self.gains.shape)
        energy = keys.square().sum(-1, keepdim=True)
        spread = self.floors * energy + (along.square() * self.gains).sum(-1)
        # Of a key along a leading direction, such as an attention sink's, the sum leaves but its rounding error.
        least = (self.floors + self.gains.amin(-1)).clamp(min=0) * energy
        lengths: Tensor = spread.maximum(least).clamp(min=1e-12).sqrt()
        return lengths

    def strongest(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The largest share of its threshold that any memory's score reaches, and which: (..., M) → two (...)."""
        strength, nearest = (scores.float() / self._limits(scores.device)).max(-1)
        return strength, nearest

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of every memory."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: tuple[float, ...]) -> None:
        self._thresholds = thresholds
        # A lookup has as many as edits, and all the same: every pass would go through them to find that out.
        self._shared = thresholds[0] if len(set(thresholds)) == 1 else None

    def _limits(self, device: torch.device, *, of_keys: bool = False) -> Tensor | float:
        """The thresholds of memories (M,), or of keys (n,); one number where they are all the same."""
        if self._shared is not None:
            return self._shared
        limits = torch.tensor(self.thresholds, device=device)
        return limits[self.owner] if of_keys else limits

    def change(self, keys: Tensor, memory: int) -> Tensor:
        """What router ``norm`` measures: ``Δ_m a``, as nothing is known here of what the matrix itself gives."""
        return self.update(keys, memory)

    def update(self, keys: Tensor, memory: int) -> Tensor:
        """``Δ_m a``: (..., d_ff) → (..., d)."""
        return F.linear(keys[..., self.columns[memory]].to(self.delta.dtype), self.delta[memory])
