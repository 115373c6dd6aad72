"""Loads a model whose decoder layers stay in the checkpoint's files; they are read as they run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import modeling_utils

from wisecli.io.checkpoint import Checkpoint
from wisecli.models.running.hooks import hooked, overridden
from wisecli.models.streaming.expert_files import Assembly, assemblies
from wisecli.models.streaming.layer_stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_streamed(
    read: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
    drawn: PreTrainedModel,
    checkpoint: Checkpoint,
    layers: str,
    device: torch.device,
    budget: int,
) -> tuple[PreTrainedModel, dict[str, Any], LayerStream]:
    """Load all of a model but its decoder layers.

    Parameters that are put together from several tensors are written once to a temporary directory, but for those of
    experts, one of which is put together when it is asked.

    Args:
        read: loads the model and says what was missing, as ``from_pretrained`` does; takes a ``device_map``.
        drawn: the model on the meta device.
        layers: module path of the list of layers.
        budget: about how many bytes of memory there are.

    Raises:
        ModelError: a layer's tensors are not in the checkpoint as the model has them.
    """
    assembled = assemblies(drawn, layers, checkpoint)
    devices = dict.fromkeys(_beside(drawn, layers), str(device))
    devices |= {f"{layers}.{number}": "disk" for number, _ in drawn.get_submodule(layers).named_children()}
    devices |= _of_experts(drawn, assembled)
    written = Path(tempfile.mkdtemp(prefix="wise-layers-"))
    discard = partial(shutil.rmtree, written, ignore_errors=True)
    with ExitStack() as unless_loaded, _without_hooks() as places:
        unless_loaded.callback(discard)
        model, info = read(device_map=devices, offload_folder=str(written))
        unless_loaded.pop_all()
    weakref.finalize(model, discard)
    model.__dict__.pop("hf_device_map", None)
    for layer in model.get_submodule(layers).children():
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    stream = LayerStream(model, layers, checkpoint, device, budget=budget, places=places, assembled=assembled)
    stream.written = written
    stream.width = _width(model, stream)
    return model, info, stream


@contextmanager
def _without_hooks() -> Iterator[dict[str, tuple[Path, str]]]:
    """Keep transformers from hooking layers to fetch them; yield where parameters lie, and by which names."""
    places: dict[str, tuple[Path, str]] = {}
    loading: Any = modeling_utils
    usual = loading.accelerate_dispatch

    def note(*given: Any) -> None:
        index = given[4] or {}
        places.update({name: (Path(at["safetensors_file"]), at["weight_name"]) for name, at in index.items()})

    loading.accelerate_dispatch = note
    try:
        yield places
    finally:
        loading.accelerate_dispatch = usual


@torch.no_grad()
def _width(model: PreTrainedModel, stream: LayerStream) -> int:
    """Return how long the tuples are that layers give, seen by running the first one on one token."""
    kept: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(stream.filled(0))
        stack.enter_context(hooked(stream.layers[0].register_forward_hook(lambda *given: kept.append(given[-1]))))
        stack.enter_context(overridden(stream.layers[1:], lambda *_, **__: kept[0]))
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=stream.device), use_cache=False)
    stream.release()
    return len(kept[0]) if isinstance(kept[0], (tuple, list)) else 0


def _of_experts(model: nn.Module, assembled: Mapping[str, Assembly]) -> dict[str, str]:
    """Return the device of each parameter that is not read, and of those beside it, whose names may begin with its."""
    modules = {name.rpartition(".")[0] for name in assembled}
    return {
        f"{path}.{name}": "meta" if f"{path}.{name}" in assembled else "disk"
        for path in modules
        for name, _ in model.get_submodule(path).named_parameters()
    }


def _beside(model: nn.Module, layers: str) -> Iterator[str]:
    """Yield the paths of the modules and parameters that together are all but the layers."""
    parts = layers.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        inside = model.get_submodule(parent)
        names = (name for name, _ in (*inside.named_children(), *inside.named_parameters(recurse=False)))
        yield from (f"{parent}.{name}".lstrip(".") for name in names if name != part)
