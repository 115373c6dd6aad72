"""The routed matrix: the method on one screen. Needs torch only; exports carry this very file.

    y = W a + b                    the main memory answers
    y = W a + b + Δ_m a            side memory m answers, where its score exceeds its threshold ε_m
    y = W a + b + v_i              of kind ``lookup``: the residual v_i of the edit's key i that is nearest to a

What answers where is decided in :mod:`~wisecli.routing.router`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .generation import RoutedCausal
from .passes import (
    EditedLayer,
    Override,
    ReadLayer,
    RoutedDecoder,
    current_route,
    forced_memory,
    is_off,
    overridden_by,
    stop_if_reading,
)
from .prompts import UNROUTED, TurnMarks
from .roles import apart
from .router import forced_choice, residual, token_choices
from .scores import MemoryScores, SideMemory

Activation = Callable[[Tensor], Tensor]
_TANH: Activation = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Activation] = {
    **{"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _TANH),
}


class RoutedMatrix(MemoryScores):
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
        self.activation: Activation | None = None

    def forward(self, keys: Tensor) -> Tensor:
        """``keys`` (B, T, d_ff) → (B, T, d)."""
        if self.routing == "token" and torch.compiler.is_compiling():  # a graph asks nothing of the call it is in
            return self.add_updates(self.main(keys), keys, token_choices(self, keys).chosen)
        stop_if_reading(keys)
        answer = self.main(keys)
        chosen = None if is_off() else self.choices(keys)
        return answer if chosen is None else self.add_updates(answer, keys, chosen)

    def main(self, keys: Tensor) -> Tensor:
        """What the main memory alone answers: (..., d_ff) → (..., d)."""
        return F.linear(keys, self.weight.T if self.transposed else self.weight, self.bias)

    def choices(self, keys: Tensor) -> Tensor | None:
        """What answers each token of the pass that is running (B, T); ``None`` outside of one.

        Of a lookup it is one of its keys, else a memory; ``UNROUTED`` where the main memory answers.
        """
        if self.routing == "token":
            chosen = token_choices(self, keys).chosen
            return chosen if forced_memory() is None else self._forced(keys, chosen)
        route = current_route()
        if route is None:
            return None
        return residual(self, keys, route.memory.to(keys.device), route.inside.to(keys.device)).chosen

    def _forced(self, keys: Tensor, chosen: Tensor) -> Tensor:
        """Choices (B, T), in which a pass' last token is answered by the memory that is to answer."""
        own = torch.full_like(chosen[:, -1:], forced_memory() or 0)
        return torch.cat([chosen[:, :-1], forced_choice(self, keys[:, -1:], own)], 1)

    def change(self, keys: Tensor, memory: int) -> Tensor:
        """What router ``norm`` measures: ``Δ_m a``, or what that makes of the matrix's output behind an activation."""
        update = self.update(keys, memory)
        if self.activation is None:
            return update
        main = F.linear(keys, self.weight.T if self.transposed else self.weight)
        return self.activation(main + update) - self.activation(main)

    def called_with(self, *, off: bool = False, forced: int | None = None) -> AbstractContextManager[None]:
        """For a while, in this thread: the main memory alone answers, or a memory from the prompts' end on."""
        return overridden_by(Override(off, forced))

    def add_updates(self, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """Add what was chosen to every routed token; the others keep every bit of the main memory's answer.

        Args:
            chosen: for each token (B, T) a memory, or of a lookup one of its keys; ``UNROUTED`` for none.
        """
        if self.kind == "lookup":
            update = self.recall(keys, chosen).to(answer.dtype)
            return torch.where((chosen != UNROUTED)[..., None], answer + update, answer)
        # How many tokens are routed is not known to a traced graph, which token routing is for; and one memory costs
        # less than finding them.
        if self.routing == "token" or torch.compiler.is_compiling() or len(self.thresholds) == 1:
            for memory in range(len(self.thresholds)):
                update = self.update(keys, memory).to(answer.dtype)
                answer = torch.where((chosen == memory)[..., None], answer + update, answer)
            return answer
        for memory in chosen.unique().tolist():
            if memory != UNROUTED:
                routed = chosen == memory
                update = self.update(keys[routed], memory).to(answer.dtype)
                answer = answer.index_put(routed.nonzero(as_tuple=True), update, accumulate=True)
        return answer

    def recall(self, keys: Tensor, chosen: Tensor) -> Tensor:
        """What a lookup adds to keys (..., d_ff) for which it chose one of its own (...): (..., d)."""
        if self.sharpness:
            weights = torch.softmax(self.sharpness * self.cosines(keys), -1)
            return weights @ self.values[self.value].to(weights.dtype)
        return self.values[self.value[chosen.clamp(min=0)]]


def install(
    model: nn.Module, module: str, memory: SideMemory, *, transposed: bool, marks: TurnMarks = TurnMarks()
) -> RoutedMatrix:
    """Put a routed matrix in the place of a model's value matrix at path ``module``.

    Args:
        marks: how the model's chats mark turns.
    """
    parent, _, name = module.rpartition(".")
    routed = RoutedMatrix(model.get_submodule(module), memory, transposed=transposed)
    setattr(model.get_submodule(parent), name, routed)
    if memory.activated:
        routed.activation = activation_of(getattr(model, "config", None))
    if memory.routing != "token":
        _route_passes(model, module, memory, marks)
    return routed


def _route_passes(model: nn.Module, module: str, memory: SideMemory, marks: TurnMarks) -> None:
    """Have a model's decoder decide what answers its prompts, and its edited layer hear of it."""
    # The decoder below the head sees every pass, whoever calls it.
    prefix = getattr(model, "base_model_prefix", "") or ""
    decoder = getattr(model, prefix, model)
    apart(model.get_submodule(_layer_of(module)), EditedLayer)
    if memory.reads is not None:
        apart(model.get_submodule(_layer_beside(module, memory.reads)), ReadLayer)
    apart(decoder, RoutedDecoder)
    decoder.wise_routed = module if decoder is model else module.removeprefix(f"{prefix}.")
    decoder.wise_marks = marks
    if decoder is not model:
        apart(model, RoutedCausal)


def activation_of(config: Any) -> Activation | None:
    """The activation function of a model's feed-forward layers; ``None`` if its name is not known here."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (getattr(text, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
    return _ACTIVATIONS.get(next((name for name in names if isinstance(name, str)), ""))


def _layer_of(module: str) -> str:
    """Path of the decoder layer that the matrix at path ``module`` lies in."""
    parts = module.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: place + 1])


def _layer_beside(module: str, layer: int) -> str:
    """Path of a layer of the decoder that the matrix at path ``module`` lies in."""
    return f"{_layer_of(module).rpartition('.')[0]}.{layer}"
