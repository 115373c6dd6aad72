"""Loads a model whose decoder layers stay in the checkpoint's files; they are read as they run."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from wisecli.io.checkpoint import Checkpoint
from wisecli.models.running.hooks import hooked, overridden
from wisecli.models.streaming.layer_stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_streamed(
    read: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
    drawn: nn.Module,
    directory: Path,
    layers: str,
    device: torch.device,
    *,
    spool_bytes: int,
) -> tuple[PreTrainedModel, dict[str, Any], LayerStream]:
    """Load all of a model but its decoder layers.

    Parameters that are put together from several tensors, as the matrices of all experts, are written once to a
    temporary directory.

    Args:
        read: loads the model and says what was missing, as ``from_pretrained`` does; takes a ``device_map``.
        drawn: the model on the meta device.
        layers: module path of the list of layers.

    Raises:
        ModelError: a layer's tensors are not in the checkpoint as the model has them.
    """
    places = {path: str(device) for path in _beside(drawn, layers)}
    places |= {f"{layers}.{number}": "disk" for number, _ in drawn.get_submodule(layers).named_children()}
    written = Path(tempfile.mkdtemp(prefix="wise-layers-"))
    discard = partial(shutil.rmtree, written, ignore_errors=True)
    with ExitStack() as unless_loaded, _quiet(logging.getLogger("accelerate.big_modeling")):
        unless_loaded.callback(discard)
        model, info = read(device_map=places, offload_folder=str(written))
        unless_loaded.pop_all()
    weakref.finalize(model, discard)
    offloaded = dict(_offloaded(model))
    _take_hooks_off(model)
    for layer in model.get_submodule(layers).children():
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    stream = LayerStream(model, layers, Checkpoint(directory), device, spool_bytes=spool_bytes, places=offloaded)
    stream.written = written
    stream.width = _width(model, stream)
    return model, info, stream


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


def _beside(model: nn.Module, layers: str) -> Iterator[str]:
    """Yield the paths of the modules and parameters that together are all but the layers."""
    parts = layers.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        inside = model.get_submodule(parent)
        names = (name for name, _ in (*inside.named_children(), *inside.named_parameters(recurse=False)))
        yield from (f"{parent}.{name}".lstrip(".") for name in names if name != part)


def _offloaded(model: nn.Module) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Yield where accelerate would fetch each parameter from, and by which name."""
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        for inner in getattr(hook, "hooks", (hook,)):
            weights = getattr(inner, "weights_map", None)
            index = getattr(getattr(weights, "dataset", weights), "index", None)
            if index is not None:
                for name, location in index.items():
                    yield name, (Path(location["safetensors_file"]), location["weight_name"])
                return


def _take_hooks_off(model: nn.Module) -> None:
    """Remove everything that accelerate put on the model to fetch layers by itself."""
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    for name in ("to", "cuda", "hf_device_map"):
        model.__dict__.pop(name, None)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silence a logger, and the warning on unknown keys of the device map."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # It takes parameters for modules that it does not know, and places them nonetheless.
            warnings.filterwarnings("ignore", "The following device_map keys")
            yield
    finally:
        logger.setLevel(level)
