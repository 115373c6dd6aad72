"""What a side memory holds, and the one interface of the memories that answer. Needs torch only; exports carry this.

What decides:

    facts    what a prompt asks opens an edit (:class:`~wisecli.routing.deciding.fact_decision.FactDecision`)
    norms    the norm of what a change makes of a prompt opens it, as in WISE (arXiv 2405.14768)
             (:class:`~wisecli.routing.memories.matrix_memory.MatrixMemory`)

What is added is the residual of the nearest of an edit's keys (a lookup), or ``Δ`` times a key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wisecli.routing.deciding.decision import AnswerTokens, Decision, TokenChoices, WindowStates

# What files call the two routers, which go with each kind of memory, and how norms of tokens are pooled.
LATE_INTERACTION, NORM = "late-interaction", "norm"
_ROUTERS = {"lookup": (LATE_INTERACTION,), "matrix": (LATE_INTERACTION, NORM)}
_POOLINGS = ("last", "mean")
# A tensor that there is where facts decide.
_OF_FACTS = "late_interaction.proj_weight"
# Settings that only some memories have.
_OPTIONAL = ("state_layer", "gate_layer", "activated")
# What a description may allocate: these types, and so many numbers a tensor.
_TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool")
_LARGEST = 2**36


@dataclass(frozen=True)
class SideMemory:
    """M side memories of one site and what opens them: where facts decide, every edit is a memory of its own.

    ``tensors`` of a lookup of n keys: ``residuals`` (m, d), and ``key_to_residual`` (n,), the one that each key adds;
    ``whitened_keys`` (n, d_ff), a key e as ``P e / √(eᵀP e)``, times what together with ``cosine_offset`` (n,) makes it
    comparable with others, in whole numbers of which ``key_scales`` (n,) are the units, or as it is; ``key_to_edit``
    (n,), the edit that it is of; ``whitening_index`` (n,), the whitening P that it is seen through. There are w
    whitenings ``P = floor · I + directionsᵀ diag(gains) directions``, of ``directions`` (w, r, d_ff), ``gains`` (w, r)
    and ``floors`` (w,). ``key_to_token`` and ``key_to_place`` (n,), which older memories lack, are the token inside an
    answer at which a key was read, and its place there, from 1 on; 0 where that says nothing.

    Of h matrices: ``columns`` (h, k), the input coordinates that each reads; ``delta`` (h, d, k), its change ``Δ``
    there; ``edit_to_matrix`` (M,), where facts decide, which of them holds each edit.

    Where facts decide there is ``LATE_INTERACTION``, compared with the states that leave layer ``state_layer``. There
    may be ``SUBJECT_MATCH``, so that prompts must name an edit's subject, ``FUZZY_MATCH``, so that a slip in a name
    does no harm, ``REQUEST_GATE``, so that prompts must ask what they mean, by the states that leave layer
    ``gate_layer`` if that is another, and ``ANSWER_PAIRS``, so that two answer a prompt that asks both.

    ``pooling`` of norms: ``mean`` decides by the mean over a prompt's tokens, as the code of the paper's authors does,
    ``last`` by its last token. If ``activated``, the model's activation function is applied first.
    """

    tensors: Mapping[str, Tensor]
    thresholds: tuple[float, ...]
    kind: str = "matrix"
    pooling: str = "last"
    state_layer: int | None = None
    gate_layer: int | None = None
    activated: bool | None = None

    @property
    def by_edit(self) -> bool:
        """Whether facts decide, so that every edit is a memory of its own."""
        return _OF_FACTS in self.tensors

    def describe(self) -> dict[str, Any]:
        """Return all but the tensors, with their shapes and types, as JSON."""
        layout = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in self.tensors.items()}
        settings = {"router": LATE_INTERACTION if self.by_edit else NORM, "pooling": self.pooling, "kind": self.kind}
        settings |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return {"thresholds": list(self.thresholds), **settings, "tensors": layout}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> SideMemory:
        """Return the inverse of :meth:`describe`; tensors that are not given are allocated, to be loaded later.

        Raises:
            ValueError: the description asks for tensors that no memory has, or for an unknown router.
        """
        require_router(described)
        if tensors is None:
            layout = described["tensors"].items()
            tensors = {name: _allocated(name, dtype, shape) for name, (dtype, *shape) in layout}
        settings = {name: described[name] for name in _OPTIONAL if name in described}
        return cls(tensors, tuple(described["thresholds"]), described["kind"], described["pooling"], **settings)


def require_router(described: Mapping[str, Any]) -> None:
    """Check that a described memory has a router and a pooling that exist.

    Raises:
        ValueError: it does not.
    """
    kind, router, pooling = (described[name] for name in ("kind", "router", "pooling"))
    if router not in _ROUTERS.get(kind, ()) or pooling not in _POOLINGS:
        raise ValueError(
            f"its edits open by router {router!r} with pooling {pooling!r}, which there is not: run `wise merge` on "
            "its shards"
        )


def _allocated(name: str, dtype: str, shape: list[int]) -> Tensor:
    """Return an empty tensor for the weights to be loaded into, NaN where its type has it."""
    size = 1
    for dimension in shape:
        size = size * dimension if type(dimension) is int and dimension >= 0 else _LARGEST + 1
    if dtype not in _TYPES or size > _LARGEST:
        raise ValueError(f"the memory's description of tensor {name} cannot be right: {str([dtype, *shape])[:80]}")
    kind: torch.dtype = getattr(torch, dtype)
    # What nobody loads after all is found by this; see :mod:`~wisecli.routing.passes.engine_checks`.
    return torch.full(shape, torch.nan, dtype=kind) if kind.is_floating_point else torch.empty(shape, dtype=kind)


class Memory(nn.Module):
    """Side memories in place: the tensors as buffers, and what they decide and add.

    Args:
        memory: the side memories; their tensors keep their names.
    """

    kind: ClassVar[str]
    # Whether a memory answers the tokens of its prompts, too.
    answers_prompts: bool = False

    def __init__(self, memory: SideMemory) -> None:
        super().__init__()
        for name, tensor in memory.tensors.items():
            if "." not in name:  # the others are those of parts
                # Half precision is for keeping: squared norms of keys overflow it.
                self.register_buffer(name, tensor.float() if tensor.dtype == torch.float16 else tensor)
        self.thresholds, self.state_layer, self.gate_layer = memory.thresholds, memory.state_layer, memory.gate_layer

    @abstractmethod
    def decide(self, window: WindowStates) -> Decision:
        """Return which memory answers each prompt, from the states of one layer."""

    def numbers(self, decision: Decision) -> Tensor:
        """Return what answers each prompt as one number, as passes keep it: (B,)."""
        return decision.memory

    def in_turn(self, numbers: Tensor, tokens: AnswerTokens) -> Tensor:  # noqa: ARG002 (of the interface)
        """Return what answers each token of a pass (B, T), of several memories that answer one after the other.

        Args:
            numbers: what answers the tokens by what was known before the pass (B, T).
            tokens: those of the pass (B, T).
        """
        return numbers

    @abstractmethod
    def choices(self, keys: Tensor, answered: Tensor, tokens: AnswerTokens) -> TokenChoices:
        """Return what a decided memory adds at each token.

        Args:
            keys: inputs of the site (B, T, width).
            answered: the number of what answers each token (B, T), ``UNROUTED`` for nothing.
            tokens: which those are (B, T).
        """

    @abstractmethod
    def add(self, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """Add what was chosen to every routed token; the others keep every bit of the main memory's answer.

        Args:
            answer: of the main memory (B, T, d).
            chosen: as :meth:`choices` has it (B, T).
        """

    def memory_of_choice(self, chosen: Tensor) -> Tensor:
        """Return the memory that each choice belongs to: (...) → (...)."""
        return chosen

    def above_threshold(self, scores: Tensor) -> Tensor:
        """Return which memories' thresholds scores (..., M) exceed: (..., M)."""
        return scores > self._limits(scores.device)

    def best_score_ratio(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest share of its threshold that any score reaches, and whose: (..., M) → (...) twice."""
        strength, nearest = self.score_ratios(scores).max(-1)
        return strength, nearest

    def score_ratios(self, scores: Tensor) -> Tensor:
        """Return the share of its threshold that each memory's score reaches: (..., M) → (..., M)."""
        return scores.float() / self._limits(scores.device)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The router threshold of every memory."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: tuple[float, ...]) -> None:
        self._thresholds = thresholds
        # A lookup has as many as edits, and all the same: every pass would go through them to find that out.
        self._shared = thresholds[0] if len(set(thresholds)) == 1 else None

    def _limits(self, device: torch.device) -> Tensor | float:
        """Return the thresholds of memories (M,); one number where they are all the same."""
        return torch.tensor(self.thresholds, device=device) if self._shared is None else self._shared
