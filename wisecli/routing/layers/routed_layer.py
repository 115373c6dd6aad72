"""The routed site, which applies a memory in a model. Needs torch only; exports carry this very file.

    y = W a + b                    the main memory answers
    y = W a + b + Δ_m a            side memory m answers        (:mod:`~wisecli.routing.memories.matrix_memory`)
    y = W a + b + v_i              edit i answers               (:mod:`~wisecli.routing.memories.fact_memory`)

or, behind a decoder layer, the same with the layer's output ``h`` in the place of ``W a + b``.

What answers a prompt is decided from its token ids, once, by the memory's ``decide``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.prompt_window import TurnMarks
from wisecli.routing.layers.layer_output_memory import LayerOutputMemory
from wisecli.routing.layers.module_types import add_mixin
from wisecli.routing.memories.fact_memory import FactMemory
from wisecli.routing.memories.matrix_memory import FactMatrixMemory, MatrixMemory
from wisecli.routing.memories.side_memory import Memory, SideMemory
from wisecli.routing.passes.routed_generation import RoutedCausal
from wisecli.routing.passes.routed_pass import (
    EditedLayer,
    Override,
    ReadLayer,
    RoutedDecoder,
    current_route,
    is_off,
    overridden_by,
    read_here,
)

Activation = Callable[[Tensor], Tensor]
_TANH: Activation = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Activation] = {
    **{"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _TANH),
}


class Routed(Memory):
    """A memory in its place in a model."""

    def called_with(self, *, off: bool = False, forced: int | None = None) -> AbstractContextManager[None]:
        """Return a context, of this thread alone, in which only the main memory answers, or one memory always does."""
        return overridden_by(Override(off, forced))


class RoutedMatrix(Routed):
    """A value matrix with side memories; a plain module, so that nothing mistakes it for a linear layer.

    Args:
        base: the module it stands in for; its ``weight`` and ``bias`` keep their names.
        memory: the side memories; their tensors become buffers.
        transposed: whether the weight is stored (d_ff, d).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Module, memory: SideMemory, *, transposed: bool) -> None:
        super().__init__(memory)
        self.register_parameter("weight", base.get_parameter("weight"))
        self.register_parameter("bias", getattr(base, "bias", None))
        self.transposed = transposed

    @classmethod
    def put(cls, model: nn.Module, described: Mapping[str, Any], memory: SideMemory) -> RoutedMatrix:
        """Put it in the place of a model's value matrix."""
        parent, _, name = described["module"].rpartition(".")
        routed = cls(model.get_submodule(described["module"]), memory, transposed=described["transposed"])
        setattr(model.get_submodule(parent), name, routed)
        add_mixin(model.get_submodule(layer_of(described["module"])), EditedLayer)
        return routed

    def forward(self, keys: Tensor) -> Tensor:
        """Return the output (B, T, d) for keys (B, T, d_ff)."""
        if self.state_layer is None:
            read_here(keys)
        answer = F.linear(keys, self._matrix, self.bias)
        route = None if is_off() else current_route()
        if route is None:
            return answer
        chosen = self.choices(keys, *route.at(keys)).chosen
        return self.add(answer, keys, chosen)

    @property
    def _matrix(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight


class RoutedFactMemory(RoutedMatrix, FactMemory):
    """A value matrix with a lookup beside it."""


class RoutedFactMatrix(RoutedMatrix, FactMatrixMemory):
    """A value matrix with changes of it beside it, which hold facts."""


class RoutedMatrixMemory(RoutedMatrix, MatrixMemory):
    """A value matrix with changes of it beside it, which their norm opens."""

    activation: Activation | None = None

    @classmethod
    def put(cls, model: nn.Module, described: Mapping[str, Any], memory: SideMemory) -> RoutedMatrixMemory:
        """Put it in the place of a model's value matrix, before that model's activation."""
        routed = cast(RoutedMatrixMemory, super().put(model, described, memory))
        if memory.activated:
            routed.activation = activation_of(getattr(model, "config", None))
        return routed

    def scored_output(self, keys: Tensor, memory: int) -> Tensor:
        """Return what the norm is taken of: ``Δ_m a``, or the change that it makes behind an activation."""
        update = self.delta_output(keys, memory)
        if self.activation is None:
            return update
        main = F.linear(keys, self._matrix)
        return self.activation(main + update) - self.activation(main)


class BehindLayer(Routed):
    """A memory behind a decoder layer."""

    @classmethod
    def put(cls, model: nn.Module, described: Mapping[str, Any], memory: SideMemory) -> BehindLayer:
        """Add a memory to the output of one of a model's layers."""
        parent, _, name = described["module"].rpartition(".")
        routed, layer = cls(memory), cast(LayerOutputMemory, model.get_submodule(parent))
        setattr(layer, name, routed)
        add_mixin(layer, LayerOutputMemory)
        layer.wise_streams = described.get("streams")
        return routed


class LayerFactMemory(BehindLayer, FactMemory):
    """A lookup behind a decoder layer."""


class LayerFactMatrix(BehindLayer, FactMatrixMemory):
    """Changes of what leaves a decoder layer, which hold facts."""


class LayerMatrixMemory(BehindLayer, MatrixMemory):
    """Changes of what leaves a decoder layer, which their norm opens."""


# By what is added, and whether facts decide: alone, beside a matrix, and behind a layer.
_KINDS: dict[tuple[str, bool], tuple[type[Memory], type[RoutedMatrix], type[BehindLayer]]] = {
    ("lookup", True): (FactMemory, RoutedFactMemory, LayerFactMemory),
    ("matrix", True): (FactMatrixMemory, RoutedFactMatrix, LayerFactMatrix),
    ("matrix", False): (MatrixMemory, RoutedMatrixMemory, LayerMatrixMemory),
}


def memory_module(memory: SideMemory) -> Memory:
    """Return the module that applies a side memory, outside of any model."""
    return _KINDS[memory.kind, memory.by_edit][0](memory)


def install_as(
    model: nn.Module, described: Mapping[str, Any], memory: SideMemory, *, marks: TurnMarks = TurnMarks()
) -> Routed:
    """Install a memory at the site that a checkpoint's config describes.

    Args:
        described: ``module`` is the path of what answers there: of a value matrix, which is ``transposed`` or not, or
            of a memory behind a decoder layer. There, ``decoder`` is the path of the module that is given the tokens
            of prompts, if not the one below the head, and ``streams`` the axis of several streams in layers' output.
        marks: how the model's chats mark turns.
    """
    _, in_matrix, behind_layer = _KINDS[memory.kind, memory.by_edit]
    kind: type[RoutedMatrix | BehindLayer] = in_matrix if "transposed" in described else behind_layer
    routed = kind.put(model, described, memory)
    _route_passes(model, described, memory, marks)
    return routed


def _route_passes(model: nn.Module, described: Mapping[str, Any], memory: SideMemory, marks: TurnMarks) -> None:
    """Make a model's decoder decide what answers its prompts, and pass that on to the edited layer."""
    module, path = described["module"], described.get("decoder")
    # The decoder below the head sees every pass, whoever calls it.
    path = (getattr(model, "base_model_prefix", "") or "") if path is None else path
    decoder: Any = model.get_submodule(path) if path and hasattr(model, path.partition(".")[0]) else model
    for layer in {memory.state_layer, memory.gate_layer} - {None}:
        read: Any = model.get_submodule(f"{layer_of(module).rpartition('.')[0]}.{layer}")
        add_mixin(read, ReadLayer)
        read.wise_streams = described.get("streams")
    add_mixin(decoder, RoutedDecoder)
    decoder.wise_routed = module if decoder is model else module.removeprefix(f"{path}.")
    decoder.wise_marks = marks
    if decoder is not model:
        add_mixin(model, RoutedCausal)
        cast(RoutedCausal, model).wise_decoder = path


def activation_of(config: Any) -> Activation | None:
    """Return the activation function of a model's feed-forward layers, or ``None`` if its name is unknown."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (getattr(text, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
    return _ACTIVATIONS.get(next((name for name in names if isinstance(name, str)), ""))


def layer_of(module: str) -> str:
    """Return the path of the decoder layer that holds the matrix at path ``module``."""
    parts = module.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: place + 1])
