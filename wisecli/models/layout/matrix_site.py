"""The value matrix of a feed-forward layer as a site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wisecli.errors import ModelError
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_tensor
from wisecli.io.json_schema import CLOSED
from wisecli.models.layout.architectures import CACHED, stored_weight
from wisecli.models.layout.site_interface import NOTHING, Mismatch, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class MatrixSite(Site):
    """The value matrix: ``W`` of shape ``(d, d_ff)``.

    A change ``u`` of what the matrix gives changes what leaves the layer by ``multiplier · u``, or, where the output
    passes the module ``norm`` first, by what that makes of it.
    """

    __pydantic_config__ = CLOSED

    architecture: str
    layer: int
    layer_module: str
    module: str
    transposed: bool
    d: int
    d_ff: int
    norm: str | None = None
    multiplier: float = 1.0

    above = CACHED
    streams = None
    name = "matrix"
    what = "edited matrix"
    has_matrix = True
    unit = 1.0

    @property
    def weight(self) -> str:
        """Name of the weight tensor in the checkpoint."""
        return f"{self.module}.weight"

    @property
    def base_name(self) -> str:
        """Name of the weight."""
        return self.weight

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight tensor in the checkpoint."""
        return (self.d_ff, self.d) if self.transposed else (self.d, self.d_ff)

    @property
    def width(self) -> int:
        """Length of a key, ``d_ff``."""
        return self.d_ff

    def described(self) -> dict[str, Any]:
        """Return the path of the matrix, and how it is stored."""
        return {"module": self.module, "transposed": self.transposed}

    def watched(self, model: nn.Module) -> nn.Module:
        """Return the module whose input is read: the one that holds the matrix."""
        return model.get_submodule(self.module)

    def keys(self, inputs: tuple[Any, ...], output: Any) -> Tensor:  # noqa: ARG002 (of the interface)
        """Return the matrix's input."""
        keys: Tensor = inputs[0]
        return keys

    def base_output(self, checkpoint: Checkpoint, keys: Tensor) -> Tensor:
        """Return ``W a``."""
        return keys @ self.matrix(checkpoint).to(keys).T

    def matrix(self, checkpoint: Checkpoint) -> Tensor:
        """Return the base matrix ``W``, transposed to ``(d, d_ff)`` where it is stored otherwise."""
        weight = checkpoint.load(self.stored(checkpoint))
        return weight.T if self.transposed else weight

    def prefix_in(self, checkpoint: Checkpoint) -> str:
        """Return the name of the matrix, below which the memory's tensors lie."""
        return self.stored(checkpoint).removesuffix("weight")

    def mismatch(self, checkpoint: Checkpoint) -> Mismatch | None:
        """Return the weight, if it is not there or of another shape."""
        weight, expected = stored_weight(checkpoint, self.module), "×".join(map(str, self.stored_shape))
        if weight is None:
            return Mismatch(self.weight, expected, NOTHING)
        shape = checkpoint.shape(weight)
        return None if shape == self.stored_shape else Mismatch(self.weight, expected, "×".join(map(str, shape)))

    def digest(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> str:
        """Return the digest of the matrix."""
        matrix = self.matrix(checkpoint)
        return sha256_tensor(matrix if dtype is None else matrix.to(dtype))

    def below(self, layer: int) -> MatrixSite:
        """Return the value matrix of a lower layer."""
        path = f"{self.layer_module.rpartition('.')[0]}.{layer}"
        module = path + self.module[len(self.layer_module) :]
        return replace(self, layer=layer, layer_module=path, module=module, norm=None)

    def is_at(self, planned: Site) -> bool:
        """Return whether the matrix is the same."""
        return replace(self, norm=planned.norm, multiplier=planned.multiplier) == planned

    def stored(self, checkpoint: Checkpoint) -> str:
        """Return the name of the weight in a checkpoint."""
        return stored_weight(checkpoint, self.module) or self.weight


def as_matrix(site: Site) -> MatrixSite:
    """Return a site as one of a matrix.

    Raises:
        ModelError: edits are added behind a layer.
    """
    if not isinstance(site, MatrixSite):
        raise ModelError(
            f"these edits are added behind layer {site.layer}, to no matrix: for one, write them with `wise edit --set "
            "site=matrix` and merge with --mode merge; a lookup is exported with --format routed"
        )
    return site
