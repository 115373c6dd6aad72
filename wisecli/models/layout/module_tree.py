"""Where a model keeps its layers and its value matrix, read off its module tree on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wisecli.config import LoadOptions
from wisecli.errors import OwnCodeError, UnknownArchitectureError, reason_of
from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.models.layout.architectures import (
    Layout,
    architectures,
    class_config,
    layer_count,
    loader_name,
    quantisation_of,
    stored_weight,
)
from wisecli.progress import NOTE, Event, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that say how wide the feed-forward layer is.
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "ffn_size", "n_inner", "d_ff", "d_inner")
_PLACE = "{layer}"
_REMEDY = "of others name the matrix with --set target_module=PATH"


def read_off(
    directory: Path,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    lookup: bool,
    load: LoadOptions,
    on_progress: ProgressCallback,
) -> Layout:
    """Return the layout in the module tree: for a lookup the layers alone, else with the one likely value matrix."""
    architecture = str(config.get("model_type"))
    model = _built(directory, architecture, trust_remote_code=load.trust_remote_code)
    if lookup:
        layout = _behind_layers(model, directory, architecture)
        # Numbers that transformers makes of others are there for a whole layer at a time.
        return layout if quantisation_of(config) is None else replace(layout, experts=())
    layout = _inferred(directory, architecture, _matrices(model, directory, checkpoint))
    path = f"{layout.layers}.{_PLACE}.{layout.value}"
    note = f"architecture {layout.architecture!r} is not in the table: {path} is taken for its value matrix"
    on_progress(Event(NOTE, note=f"{note}; name another with --set target_module=PATH"))
    return layout


def _built(directory: Path, architecture: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model on the meta device.

    Raises:
        UnknownArchitectureError: it cannot be built.
    """
    try:
        import transformers  # takes long, and most models are known

        config = class_config(directory, trust_remote_code=trust_remote_code)
        loader = getattr(transformers, loader_name(config.model_type))
        with torch.device("meta"):
            model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what an arbitrary config makes transformers raise
        if not trust_remote_code and "auto_map" in read_json(directory / "config.json"):
            raise OwnCodeError(directory) from error
        raise UnknownArchitectureError(_why_not_built(directory, architecture, error)) from error
    return model


def _why_not_built(directory: Path, architecture: str, error: Exception) -> str:
    """Return a message on why transformers builds no model: the type generates no text, or its own error."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    writing = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    if architecture in CONFIG_MAPPING and not any(CONFIG_MAPPING[architecture] in kinds for kinds in writing):
        return f"{directory}: models of type {architecture!r} generate no text in transformers; edit a decoder"
    return (
        f"{directory}: transformers cannot build a model of type {architecture!r} ({reason_of(error)}); install what "
        "it asks for or a newer transformers, or edit another model"
    )


def _matrices(model: PreTrainedModel, directory: Path, checkpoint: Checkpoint) -> dict[str, bool]:
    """Return the candidates for the value matrix that the checkpoint holds, as :func:`value_paths` has them."""
    return {
        path: turned
        for path, turned in value_paths(model, layer_count(directory)).items()
        if stored_weight(checkpoint, path.replace(_PLACE, "0")) is not None
    }


def _inferred(directory: Path, architecture: str, found: Mapping[str, bool]) -> Layout:
    """Return the layout with the value matrix that was found.

    Raises:
        UnknownArchitectureError: that leaves a choice.
    """
    if len(found) != 1:
        candidates = f"its value matrix may be any of {', '.join(sorted(found))}" if found else "no matrix stands out"
        raise UnknownArchitectureError(
            f"{directory}: architecture {architecture!r} is not supported, and {candidates}; known are "
            f"{', '.join(sorted(architectures()))}; {_REMEDY}"
        )
    path, turned = next(iter(found.items()))
    layers, _, value = path.partition(f".{_PLACE}.")
    return Layout(architecture, layers, value, turned, known=False)


def _behind_layers(model: PreTrainedModel, directory: Path, architecture: str) -> Layout:
    """Return the layout with the decoder layers alone: the list that is as long as the model is deep, or the largest.

    Raises:
        UnknownArchitectureError: the model has no list of layers.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not _in_a_list(name)
    }
    deep = {name: size for name, size in sizes.items() if len(_list(model, name)) == layer_count(directory)}
    if not sizes:
        raise UnknownArchitectureError(f"{directory}: architecture {architecture!r} has no list of decoder layers")
    layers = max(deep or sizes, key=(deep or sizes).__getitem__)
    each = [expert_parameters(layer).values() for layer in _list(model, layers)]
    experts = tuple(
        (sum(one.numel() for one in found), sum(one.numel() // len(one) for one in found)) for found in each
    )
    return Layout(architecture, layers, known=False, depth=len(each), experts=experts if any(each) else ())


def expert_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer that have an entry an expert, by name: those of modules that count as many."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) > 1 and len(parameter) in _expert_counts(module)
    }


def _expert_counts(module: nn.Module) -> set[int]:
    return {value for name, value in vars(module).items() if "expert" in name and type(value) is int}


def _list(model: nn.Module, name: str) -> nn.ModuleList:
    found = model.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def _in_a_list(name: str) -> bool:
    return re.search(r"\.\d+\.", f".{name}.") is not None


def value_paths(model: PreTrainedModel, count: int) -> dict[str, bool]:
    """Return the paths, with ``{layer}``, of candidates for the value matrix, and whether each is stored turned.

    Args:
        count: how many layers the model has.
    """
    config = model.config.get_text_config()
    named_widths = [getattr(config, name, None) for name in _WIDTHS]
    # A list has an entry a layer.
    widths = {width for entry in named_widths for width in (entry if isinstance(entry, (list, tuple)) else [entry])}
    widths -= {None}
    found = {}
    for layers in _layer_lists(model, count):
        each = [dict(_backward_maps(layer, config.hidden_size)) for layer in model.get_submodule(layers).children()]
        shared = {value: each[0][value] for value in each[0] if all(value in maps for maps in each)}
        exact = {value: (width, turned) for value, (width, turned) in shared.items() if width in widths}
        for value, (_, turned) in (exact or shared).items():
            found[f"{layers}.{_PLACE}.{value}"] = turned
    return found


def _layer_lists(model: nn.Module, count: int) -> Iterator[str]:
    """Yield the paths of the lists of layers: as long as the model is deep, and in no other list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _in_a_list(name):
            yield name


def _backward_maps(layer: nn.Module, width: int) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Yield linear maps inside a layer from another width to ``width``, with that width and how they are kept."""
    from transformers.pytorch_utils import Conv1D

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == width != module.in_features:
            yield name, (module.in_features, False)
        elif isinstance(module, Conv1D) and module.nf == width != module.weight.shape[0]:
            yield name, (module.weight.shape[0], True)
