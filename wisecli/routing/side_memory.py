"""The routed matrix: the method on one screen. Needs torch only; exports carry this very file.

    y = W a + b                    the main memory answers
    y = W a + b + Δ_m a            side memory m answers, where its score exceeds its threshold ε_m
    y = W a + b + v_i              of kind ``lookup``: the residual v_i of the edit's key i that is nearest to a

What answers where is decided by :func:`~wisecli.routing.router.route`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .prompt_gate import UNROUTED, PromptGate
from .router import RoutingDecision, route
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
        self.gate = None if memory.routing == "token" else PromptGate(averaging=memory.routing == "mean")
        self.activation: Activation | None = None

    def forward(self, keys: Tensor, *, off: bool = False, forced: int | None = None) -> Tensor:
        """``keys`` (B, T, d_ff) → (B, T, d).

        Args:
            off: the main memory alone answers.
            forced: this memory answers from the prompts' end on, whatever its score; see :func:`route`.
        """
        answer = F.linear(keys, self.weight.T if self.transposed else self.weight, self.bias)
        if off:
            return answer
        return self.add_updates(answer, keys, self.decide(keys, forced=forced).chosen)

    def change(self, keys: Tensor, memory: int) -> Tensor:
        """What router ``norm`` measures: ``Δ_m a``, or what that makes of the matrix's output behind an activation."""
        update = self.update(keys, memory)
        if self.activation is None:
            return update
        main = F.linear(keys, self.weight.T if self.transposed else self.weight)
        return self.activation(main + update) - self.activation(main)

    def decide(self, keys: Tensor, *, forced: int | None = None) -> RoutingDecision:
        """What answers each token of this pass (B, T, d_ff); a row's decision is kept with its attention cache."""
        rows = None if forced is None else torch.full((len(keys), 1), forced, device=keys.device)
        if self.gate is None:
            return route(self, keys, forced=rows)
        prompt = self.with_slips(self.gate.prompt(self.names, keys, self.meaning, self.spelling))
        decision = route(self, keys, prompt, forced=rows)
        if decision.at_prompt is not None:
            self.gate.keep(prompt, decision.at_prompt)
        return decision

    @contextmanager
    def called_with(self, *, off: bool = False, forced: int | None = None) -> Iterator[None]:
        """For a while, every call of this matrix inside a model gets these arguments of :meth:`forward`."""

        def add(
            _module: nn.Module, inputs: tuple[Tensor, ...], _named: dict[str, Any]
        ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            return inputs, {"off": off, "forced": forced}

        handle = self.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

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
        if self.gate is None or torch.compiler.is_compiling() or len(self.thresholds) == 1:
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


def install(model: nn.Module, module: str, memory: SideMemory, *, transposed: bool) -> RoutedMatrix:
    """Put a routed matrix in the place of a model's value matrix at path ``module``."""
    parent, _, name = module.rpartition(".")
    routed = RoutedMatrix(model.get_submodule(module), memory, transposed=transposed)
    setattr(model.get_submodule(parent), name, routed)
    if memory.activated:
        routed.activation = activation_of(getattr(model, "config", None))
    if routed.gate is not None:
        # The decoder below the head sees every pass, whoever calls it.
        decoder = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
        decoder.register_forward_pre_hook(routed.gate.before_forward, with_kwargs=True)
        decoder.register_forward_hook(routed.gate.after_forward)
        if memory.reads is not None:
            model.get_submodule(_layer_beside(module, memory.reads)).register_forward_hook(routed.gate.note_states)
    return routed


def activation_of(config: Any) -> Activation | None:
    """The activation function of a model's feed-forward layers; ``None`` if its name is not known here."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (getattr(text, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
    return _ACTIVATIONS.get(next((name for name in names if isinstance(name, str)), ""))


def _layer_beside(module: str, layer: int) -> str:
    """Path of a layer of the decoder that the matrix at path ``module`` lies in."""
    parts = module.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join([*parts[:place], str(layer)])
