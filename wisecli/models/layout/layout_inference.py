"""Where a model keeps its value matrix if no row of ``architectures.toml`` says so, and which models have none.

The model is built on the meta device, where weights take no memory. In each layer the value matrix is the one linear
map from the width of the feed-forward layer back to that of the residual stream. How its output joins the stream is
seen once the model is loaded: a change of the output must reach the layer's own as it is, times a constant, or through
one norm.

A lookup needs no matrix. Where there is none of plain numbers, none stands out, or a norm stands behind it, it is put
behind a decoder layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wisecli.config import LoadOptions
from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json
from wisecli.io.json_schema import shown
from wisecli.models.layout.architectures import (
    WIDTH_NAMES,
    Layout,
    architectures,
    known_layout,
    layer_count,
    quantisation_of,
    stored_weight,
    text_settings,
)
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that count the experts of a layer, and those that say how wide the feed-forward layer is.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "n_experts")
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "ffn_size", "n_inner", "d_ff", "d_inner")
_PLACE = "{layer}"


def find_layout(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    target_module: str | None = None,
    lookup: bool = False,
    load: LoadOptions = LoadOptions(),
    on_progress: ProgressCallback = ignore_progress,
) -> Layout:
    """Return where a model keeps its layers and matrices: as told, as the table has it, or as the module tree shows.

    Args:
        target_module: path of the value matrix, with ``{layer}`` in the place of the layer's index; or of the layers
            themselves, behind which edits are then added.
        lookup: whether edits are kept as a lookup, which needs no matrix.
        load: whether the model's own code may run, to see its module tree.

    Raises:
        ModelError: the model is quantised or a mixture of experts, and a matrix is needed.
        SettingsError: ``target_module`` has no place for the index, or names layers where a matrix is needed.
        UnknownArchitectureError: there is no row for it, and the module tree leaves a choice, or it is a model around
            a text model.
    """
    config = read_json(directory / "config.json")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{directory} is half of an encoder-decoder model, which answers no prompts; edit a decoder")
    without = why_no_matrix(directory, config, checkpoint)
    named_layers = target_module is not None and target_module.endswith(f".{_PLACE}")
    if named_layers and not lookup:
        raise SettingsError(f"--set target_module={target_module} names layers, and a matrix is needed: name that")
    if without is not None and (not lookup or (target_module is not None and not named_layers)):
        raise ModelError(without)
    known = str(config.get("model_type")) in architectures()
    if not (known or lookup) and EXPORTED_KEY not in config and isinstance(config.get("text_config"), dict):
        raise UnknownArchitectureError(
            f"{directory}: architecture {shown(config.get('model_type'))} has its text model inside another model, "
            f"and is none of those that can be edited so: {', '.join(sorted(_around_text()))}"
        )
    if target_module is not None:
        return _named_layout(directory, checkpoint, config, target_module)
    if known:
        row = known_layout(directory)
        return row.behind_layers() if lookup and (row.norm or without) else row
    if EXPORTED_KEY in config:
        raise UnknownArchitectureError(f"{directory} is an exported model; edit the base model that it was made from")
    return _read_off(
        directory, checkpoint, config, lookup=lookup, matrix=without is None, load=load, on_progress=on_progress
    )


def _read_off(
    directory: Path,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    lookup: bool,
    matrix: bool,
    load: LoadOptions,
    on_progress: ProgressCallback,
) -> Layout:
    """Return what the module tree shows: the value matrix, if it may have one that stands out, or the layers alone."""
    architecture = str(config.get("model_type"))
    model = _built(directory, architecture, trust_remote_code=load.trust_remote_code)
    found = _matrices(model, directory, checkpoint) if matrix else {}
    if lookup and len(found) != 1:
        return _behind_layers(model, directory, architecture)
    layout = _inferred(directory, architecture, found)
    path = f"{layout.layers}.{_PLACE}.{layout.value}"
    note = f"architecture {layout.architecture!r} is not in the table: {path} is taken for its value matrix"
    note += ", or edits go behind its layer if that does not do" if lookup else ""
    on_progress(Event(NOTE, note=f"{note}; name another with --set target_module=PATH"))
    return layout


def _around_text() -> Iterator[str]:
    """Architectures of the table whose text model is part of another model."""
    return (name for name, row in architectures().items() if "loader" in row)


def why_no_matrix(directory: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """Return why the feed-forward layers of a model are no single matrix of plain numbers; ``None`` if they may be."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if quantisation_of(config) is not None:
        return (
            f"{directory} is a quantised model, whose matrices cannot be changed by a little: keep edits as a lookup, "
            "or edit the model it was quantised from and quantise what `wise export` writes"
        )
    counts = [part.get(name) for part in parts for name in _EXPERTS]
    experts = any(isinstance(count, int) and count > 1 for count in counts)
    if experts or any(".experts." in name for name in checkpoint):
        return (
            f"{directory} is a mixture of experts, which has no one value matrix a layer: keep edits as a lookup, "
            "or choose a dense model of the same family"
        )
    return None


def _named_layout(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any], target: str) -> Layout:
    """Return the layout that ``--set target_module=PATH`` names; which way a matrix is stored shows in its shape."""
    architecture = str(config.get("model_type"))
    if target.endswith(f".{_PLACE}") and _PLACE not in target[: -len(_PLACE)]:
        return Layout(architecture, target[: -len(_PLACE) - 1], known=False)
    layers, separator, value = target.partition(f".{_PLACE}.")
    if not separator or not layers or not value or _PLACE in layers + value:
        raise SettingsError(
            f"--set target_module={target} must have {_PLACE} once in the place of the layer's index, "
            "as in model.layers.{layer}.mlp.down_proj"
        )
    row = known_layout(directory) if architecture in architectures() else None
    if row is not None and (row.layers, row.value) == (layers, value):
        return row
    settings = text_settings(directory)
    width = next((settings[name] for name in WIDTH_NAMES if name in settings), None)
    weight = stored_weight(checkpoint, f"{layers}.0.{value}")
    shape = checkpoint.shape(weight) if weight is not None else ()
    turned = len(shape) == 2 and shape[0] != width and shape[1] == width
    return Layout(architecture, layers, value, turned, known=False)


_REMEDY = "of others name the matrix with --set target_module=PATH"


def _built(directory: Path, architecture: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model on the meta device.

    Raises:
        UnknownArchitectureError: it cannot be built.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM  # takes long, and most models are known

        config = AutoConfig.from_pretrained(  # nosec B615 # of files of this disk
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what an arbitrary config makes transformers raise
        raise UnknownArchitectureError(
            f"{directory}: architecture {architecture!r} is not supported; known are "
            f"{', '.join(sorted(architectures()))}; {_REMEDY}"
        ) from error
    return model


def _matrices(model: PreTrainedModel, directory: Path, checkpoint: Checkpoint) -> dict[str, bool]:
    """Return what may be the value matrix of those that the checkpoint holds, as :func:`value_paths` has it."""
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
        name: sum(one.numel() for one in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not _in_a_list(name)
    }
    deep = {name: size for name, size in sizes.items() if len(_list(model, name)) == layer_count(directory)}
    if not sizes:
        raise UnknownArchitectureError(f"{directory}: architecture {architecture!r} has no list of decoder layers")
    layers = max(deep or sizes, key=(deep or sizes).__getitem__)
    return Layout(architecture, layers, known=False, depth=len(_list(model, layers)))


def _list(model: nn.Module, name: str) -> nn.ModuleList:
    found = model.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def _in_a_list(name: str) -> bool:
    return re.search(r"\.\d+\.", f".{name}.") is not None


def value_paths(model: PreTrainedModel, count: int) -> dict[str, bool]:
    """Return the paths, with ``{layer}``, of all that may be the value matrix, and whether its weight is stored turned.

    Args:
        count: how many layers the model has.
    """
    config = model.config.get_text_config()
    named_widths = [getattr(config, name, None) for name in _WIDTHS]
    # A list has an entry a layer.
    widths = {width for one in named_widths for width in (one if isinstance(one, (list, tuple)) else [one])} - {None}
    found = {}
    for layers in _layer_lists(model, count):
        each = [dict(_backward_maps(layer, config.hidden_size)) for layer in model.get_submodule(layers).children()]
        shared = {value: each[0][value] for value in each[0] if all(value in one for one in each)}
        exact = {value: one for value, one in shared.items() if one[0] in widths}
        for value, (_, turned) in (exact or shared).items():
            found[f"{layers}.{_PLACE}.{value}"] = turned
    return found


def _layer_lists(model: nn.Module, count: int) -> Iterator[str]:
    """Yield the paths of the lists of layers: as long as the model is deep, and in no other list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _in_a_list(name):
            yield name


def _backward_maps(layer: nn.Module, width: int) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Linear maps inside a layer that come from another width to ``width``, with that width and how they are kept."""
    from transformers.pytorch_utils import Conv1D

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == width != module.in_features:
            yield name, (module.in_features, False)
        elif isinstance(module, Conv1D) and module.nf == width != module.weight.shape[0]:
            yield name, (module.weight.shape[0], True)
