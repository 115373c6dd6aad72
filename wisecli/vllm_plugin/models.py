"""Model classes of edited checkpoints: for ``WiseLlamaForCausalLM``, a subclass of vLLM's own ``LlamaForCausalLM``.

A class is made when vLLM asks this module for it by its name; there is none an architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models import ModelRegistry

from wisecli.routing.layers.routed_layer import layer_of
from wisecli.vllm_plugin import residual_hooks
from wisecli.vllm_plugin.engine_names import LAYER, PREFIX, description_in
from wisecli.vllm_plugin.processes import tensor_parallel_processes
from wisecli.vllm_plugin.releases import name_of, own_paths
from wisecli.vllm_plugin.served_memory import Edited, ServedMemory
from wisecli.vllm_plugin.windows import WindowReader


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ModelRegistry.models:
        return edited_class(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


class EditedModel:
    """What a causal language model of vLLM's does besides once it is edited."""

    wise_memory: ServedMemory
    wise_settings: Any
    parameters: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with _as_its_base(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # of the class behind
        _put_memory(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load the base's weights as the base does, and the memory's tensors into the memory."""
        found: dict[str, Tensor] = {}
        others = _without_memory(self.wise_memory, weights, found)
        loaded = super().load_weights(others)  # type: ignore[misc]
        self.wise_memory.load(found, next(self.parameters()).device)
        return loaded

    def get_model_state_cls(self) -> Any:
        """Return what tells the memory of requests in vLLM's second model runner."""
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        from wisecli.vllm_plugin.model_state import state_class

        own = getattr(super(), "get_model_state_cls", None)
        # vLLM looks at the parts of a model that does not choose: this one is the only part of one.
        only: Any = self
        return state_class(resolve_model_state_cls(self.wise_settings, nn.ModuleList([only])) if own is None else own())


@functools.cache
def edited_class(name: str) -> Any:
    """Return the class of edited models of an architecture."""
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (EditedModel, base), {"__module__": __name__})


@contextmanager
def _as_its_base(config: Any) -> Iterator[None]:
    """Return a context in which a config is the base's, by whose class and architecture models choose their parts."""
    kind, own = type(config), config.architectures
    config.__class__ = getattr(kind, "wise_base", kind)
    config.architectures = description_in(config).get("architectures") or own
    try:
        yield
    finally:
        config.__class__ = kind
        config.architectures = own


def _put_memory(model: Any, vllm_config: Any) -> None:
    """Hook the memory into a vLLM model, and register it where the worker finds it."""
    config = vllm_config.model_config.hf_config
    edited = Edited.of(description_in(config))
    path = residual_hooks.path_in(model, edited.module)
    reader = WindowReader(model, vllm_config, layer_of(path).rpartition(".")[0], edited.read)
    checkpoint = Path(vllm_config.model_config.model)
    releases = checkpoint if checkpoint.is_dir() else None
    cut, processes = residual_hooks.put(model, path, behind=edited.behind), tensor_parallel_processes()
    model.wise_memory = ServedMemory(edited, config, reader, releases, cut=cut, processes=processes)
    model.wise_settings = vllm_config
    vllm_config.compilation_config.static_forward_context[LAYER] = model.wise_memory


def _without_memory(
    memory: ServedMemory, weights: Iterable[tuple[str, Tensor]], found: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's weights; the memory's tensors are put into ``found``, by their names in the memory."""
    paths = own_paths({"module": memory.edited.module, "memory": memory.edited.memory})
    for stored, tensor in weights:
        name = name_of(stored, paths)
        if name is None:
            yield stored, tensor
        else:
            found[name] = tensor.clone()
