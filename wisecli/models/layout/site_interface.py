"""Where a model is edited: in the value matrix of a feed-forward layer, or behind a decoder layer.

A site is read at its *keys*, and a *residual* is added to what it gives:

    matrix   keys are the matrix' inputs (d_ff), residuals are added to its output: the paper's
    layer    keys are the states that leave the layer (d), residuals are added to them: any decoder has such
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from wisecli.config import SiteName
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import Above

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from wisecli.routing.deciding.prompt_window import TurnMarks
    from wisecli.routing.layers.routed_layer import Routed
    from wisecli.routing.memories.side_memory import SideMemory

# What prompts mean is read at this share of the depth: deep enough to know a word by its neighbours, and cheap.
_EARLY = 4 / 30
# And what they want with what they mention at this one, where states say more of that.
_DEEPER = 20 / 30


NOTHING = "nothing"


class Mismatch(NamedTuple):
    """What a checkpoint does not hold as it should: its name, how it should be and how it is."""

    name: str
    expected: str
    found: str


class Site(ABC):
    """Where edits are read and added in a decoder layer, ``layer`` of an architecture, at path ``layer_module``.

    Attributes:
        module: path of what answers there once a memory is in place.
        base_name: what the base's own tensors at the site are called.
        name: what the setting ``site`` calls it.
        what: what they are, in words.
        has_matrix: whether edits change a matrix, so that memories can be merged into one.
        unit: the unit of lengths at the site, as a share of the length of the base's output there. A layer's output
            is long, as it is the sum of what all layers so far gave; a matrix' output is one of these.
        d: how long residuals are.
        norm: path of the norm that what is added passes before it joins the residual stream, if there is one.
        multiplier: what it is multiplied by on its way there.
        above: how the layers above run by themselves.
        streams: the axis of several streams in what the layer gives, ``None`` where there is one.
    """

    architecture: str
    layer: int
    layer_module: str
    d: int
    norm: str | None
    multiplier: float
    above: Above
    streams: int | None

    name: ClassVar[SiteName]
    what: ClassVar[str]
    has_matrix: ClassVar[bool]
    unit: ClassVar[float]

    module: str

    @property
    @abstractmethod
    def base_name(self) -> str:
        """What the base's own tensors at the site are called."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How long keys are."""

    @abstractmethod
    def prefix_in(self, checkpoint: Checkpoint) -> str:
        """Return how the names of a memory's tensors start beside the base's in a checkpoint."""

    @abstractmethod
    def mismatch(self, checkpoint: Checkpoint) -> Mismatch | None:
        """Return what a checkpoint holds at the site otherwise than it should, if anything."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return the site as a checkpoint's config describes it: enough to put a memory there."""

    @abstractmethod
    def watched(self, model: nn.Module) -> nn.Module:
        """Return the module whose forward pass shows the keys."""

    @abstractmethod
    def keys(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """Return keys (B, T, width) from a forward pass of that module."""

    @abstractmethod
    def base_output(self, checkpoint: Checkpoint, keys: Tensor) -> Tensor:
        """Return what the unedited site gives at keys (n, width), or as long: (n, d)."""

    @abstractmethod
    def matrix(self, checkpoint: Checkpoint) -> Tensor:
        """Return the base matrix ``W`` (d, width) as stored.

        Raises:
            ModelError: the site has none.
        """

    @abstractmethod
    def digest(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> str:
        """Return the digest of the base's tensors at the site, in another type if one is given."""

    @abstractmethod
    def below(self, layer: int) -> Site:
        """Return the site of a layer below, for the states that leave that layer."""

    @abstractmethod
    def is_at(self, planned: Site) -> bool:
        """Return whether a planned site is this one, whatever else is known of it by now."""

    def install(self, model: nn.Module, memory: SideMemory, marks: TurnMarks | None = None) -> Routed:
        """Put a memory there."""
        from wisecli.routing.deciding.prompt_window import TurnMarks  # with torch, which a site alone does without
        from wisecli.routing.layers.routed_layer import install_as

        return install_as(model, self.described(), memory, marks=marks or TurnMarks())

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, as the manifests keep it."""
        return asdict(cast(Any, self))  # every site is a dataclass

    def router_layer(self, depth: int) -> int:
        """Return the number of the layer, of ``depth``, whose states say what a prompt means: one below this, or of two
        layers the first, which is this one; negative if there is none.
        """
        return min(max(0, round(depth * _EARLY) - 1), self.layer - 1 if depth > 2 else 0)

    def gate_layer(self, depth: int) -> int:
        """Return the number of the layer, of ``depth``, whose states say what a prompt wants with what it mentions: one
        below this, and the router's or a deeper one.
        """
        return max(self.router_layer(depth), min(round(depth * _DEEPER) - 1, self.layer - 1))
