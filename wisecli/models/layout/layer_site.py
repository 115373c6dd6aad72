"""The states that leave a decoder layer as a site: every decoder has them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from wisecli.errors import ModelError
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_json, sha256_tensor
from wisecli.io.json_schema import CLOSED
from wisecli.models.layout.architectures import CACHED, Above, spellings
from wisecli.models.layout.site_interface import NOTHING, Mismatch, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# What a layer calls the memory behind it, as :mod:`wisecli.routing.layers.layer_states` has it.
MEMORY = "wise_memory"


@dataclass(frozen=True)
class LayerSite(Site):
    """Behind a decoder layer: keys are the states (d) that leave it, and residuals are added to them.

    ``decoder`` is the path of the module that is given a prompt's tokens, if it is not the one below the head.
    ``streams`` is the axis of several streams in what the layer gives, if there are several.
    """

    __pydantic_config__ = CLOSED

    architecture: str
    layer: int
    layer_module: str
    d: int
    above: Above = CACHED
    decoder: str | None = None
    streams: int | None = None

    norm = None
    multiplier = 1.0
    name = "layer"
    what = "edited layer"
    has_matrix = False
    unit = 1 / 3

    @property
    def base_name(self) -> str:
        """Path of the layer."""
        return self.layer_module

    @property
    def module(self) -> str:  # type: ignore[override]  # of a matrix it is stored
        """Path of the memory in the layer."""
        return f"{self.layer_module}.{MEMORY}"

    @property
    def width(self) -> int:
        """Length of a state, ``d``."""
        return self.d

    def described(self) -> dict[str, Any]:
        """Return the paths of the layer's memory and of the decoder, and where streams lie."""
        return {"module": self.module, "decoder": self.decoder, "streams": self.streams}

    def watched(self, model: nn.Module) -> nn.Module:
        """Return the module whose output is read: the layer."""
        return model.get_submodule(self.layer_module)

    def keys(self, inputs: tuple[Any, ...], output: Any) -> Tensor:  # noqa: ARG002 (of the interface)
        """Return the layer's output."""
        from wisecli.routing.layers.layer_states import state_of  # with torch, which a site alone does without

        return state_of(output, self.streams)

    def base_output(self, checkpoint: Checkpoint, keys: Tensor) -> Tensor:  # noqa: ARG002 (of the interface)
        """Return the states themselves, whose norm is the measure of residuals."""
        return keys

    def matrix(self, checkpoint: Checkpoint) -> Tensor:
        """Raise: a layer has no such matrix."""
        raise ModelError(f"{checkpoint.directory} is edited behind layer {self.layer}, and no matrix of it")

    def prefix_in(self, checkpoint: Checkpoint) -> str:
        """Return the start of the names of the memory's tensors, which lie below the layer's."""
        return f"{self._stored(checkpoint)[0]}{MEMORY}."

    def mismatch(self, checkpoint: Checkpoint) -> Mismatch | None:
        """Return the layer, if none of its tensors are there."""
        found = self._stored(checkpoint)[1]
        return None if found else Mismatch(self.base_name, "tensors", NOTHING)

    def digest(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> str:
        """Return the digest of the layer's tensors."""
        start, names = self._stored(checkpoint)
        found = {}
        for name in names:
            tensor = checkpoint.load(name)
            wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            found[name.removeprefix(start)] = sha256_tensor(wanted)
        return sha256_json(sorted(found.items()))

    def below(self, layer: int) -> LayerSite:
        """Return the site at a lower layer."""
        return replace(self, layer=layer, layer_module=f"{self.layer_module.rpartition('.')[0]}.{layer}")

    def is_at(self, planned: Site) -> bool:
        """Return whether the layer is the same."""
        return self.module == planned.module

    def _stored(self, checkpoint: Checkpoint) -> tuple[str, list[str]]:
        """Return the start of the names of the layer's own tensors in a checkpoint, and those names."""
        starts = [*spellings(f"{self.layer_module}."), *self._like(checkpoint)]
        for start in starts:
            if own := [name for name in checkpoint if name.startswith(start)]:
                return start, [name for name in own if not name.startswith(f"{start}{MEMORY}.")]
        return f"{self.layer_module}.", []

    def _like(self, checkpoint: Checkpoint) -> list[str]:
        """Return how the names of the layer's tensors may start in a checkpoint that has layers under another path: as
        the layer's path ends, and if several do, with most tensors.
        """
        matches = {name: re.match(rf"(?:\D+\.)?{self.layer}\.", name) for name in checkpoint}
        found = Counter(
            match[0] for name, match in matches.items() if match is not None and self.d in checkpoint.shape(name)
        )
        return sorted(found, key=lambda start: (_shared_end(start, f"{self.layer_module}."), found[start]))[-1:]


def _shared_end(path: str, other: str) -> int:
    """Return how many parts two paths have in common at their ends."""
    pairs = zip(reversed(path.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
