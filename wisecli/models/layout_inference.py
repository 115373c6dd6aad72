"""Where a model keeps its value matrix if no row of ``architectures.toml`` says so, and which models are refused.

The model is built on the meta device, where weights take no memory. In each layer the value matrix is the one linear
map from the width of the feed-forward layer back to that of the residual stream. How its output joins the stream is
seen once the model is loaded: a change of the output must reach the layer's own as it is, times a constant, or through
one norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wisecli.config import LoadOptions
from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json
from wisecli.io.json_schema import shown
from wisecli.models.site import Layout, architectures, known_layout, layer_count, stored_weight, text_settings
from wisecli.progress import NOTE, Event, Watcher, ignore

# Settings that count the experts of a layer, and those that say how wide the feed-forward layer is.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "n_experts")
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "ffn_size", "n_inner", "d_ff", "d_inner")
_WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "dim")
_PLACE = "{layer}"


def find_layout(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    target_module: str | None = None,
    load: LoadOptions = LoadOptions(),
    watch: Watcher = ignore,
) -> Layout:
    """Where a model keeps its value matrices: as told, as the table has it, or as the module tree shows.

    Args:
        target_module: path of the value matrix, with ``{layer}`` in the place of the layer's index.
        load: whether the model's own code may run, to see its module tree.

    Raises:
        ModelError: the model is quantised or a mixture of experts.
        SettingsError: ``target_module`` has no place for the index.
        UnknownArchitectureError: there is no row for it, and the module tree leaves a choice, or it is a model around
            a text model.
    """
    config = read_json(directory / "config.json")
    refuse_unsupported(directory, config, checkpoint)
    known = str(config.get("model_type")) in architectures()
    if not known and EXPORTED_KEY not in config and isinstance(config.get("text_config"), dict):
        raise UnknownArchitectureError(
            f"{directory}: architecture {shown(config.get('model_type'))} has its text model inside another model, "
            f"and is none of those that can be edited so: {', '.join(sorted(_around_text()))}"
        )
    if target_module is not None:
        return _told(directory, checkpoint, config, target_module)
    if known:
        return known_layout(directory)
    if EXPORTED_KEY in config:
        raise UnknownArchitectureError(f"{directory} is an exported model; edit the base model that it was made from")
    layout = _inferred(directory, checkpoint, str(config.get("model_type")), trust_remote_code=load.trust_remote_code)
    path = f"{layout.layers}.{_PLACE}.{layout.value}"
    note = f"architecture {layout.architecture!r} is not in the table: {path} is taken for its value matrix"
    watch(Event(NOTE, note=f"{note}; name another with --target-module"))
    return layout


def _around_text() -> Iterator[str]:
    """Architectures of the table whose text model is part of another model."""
    return (name for name, row in architectures().items() if "loader" in row)


def refuse_unsupported(directory: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse models whose feed-forward layers are no single matrix of plain numbers.

    Raises:
        ModelError: the model is quantised or a mixture of experts.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise ModelError(
            f"{directory} is a quantised model, whose matrices cannot be changed by a little; "
            "edit the model it was quantised from and quantise what `wise export` writes"
        )
    counts = [part.get(name) for part in parts for name in _EXPERTS]
    experts = any(isinstance(count, int) and count > 1 for count in counts)
    if experts or any(".experts." in name for name in checkpoint):
        raise ModelError(
            f"{directory} is a mixture of experts, which has no one value matrix a layer; "
            "choose a dense model of the same family"
        )


def _told(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any], target: str) -> Layout:
    """The layout that ``--target-module`` names; which way its matrix is stored shows in its shape."""
    layers, place, value = target.partition(f".{_PLACE}.")
    if not place or not layers or not value or _PLACE in layers + value:
        raise SettingsError(
            f"--target-module {target} must have {_PLACE} once in the place of the layer's index, "
            "as in model.layers.{layer}.mlp.down_proj"
        )
    architecture = str(config.get("model_type"))
    row = known_layout(directory) if architecture in architectures() else None
    if row is not None and (row.layers, row.value) == (layers, value):
        return row
    settings = text_settings(directory)
    width = next((settings[name] for name in _WIDTH_NAMES if name in settings), None)
    weight = stored_weight(checkpoint, f"{layers}.0.{value}")
    shape = checkpoint.shape(weight) if weight is not None else ()
    turned = len(shape) == 2 and shape[0] != width and shape[1] == width
    return Layout(architecture, layers, value, turned, known=False)


def _inferred(directory: Path, checkpoint: Checkpoint, architecture: str, *, trust_remote_code: bool) -> Layout:
    """The layout that the module tree shows.

    Raises:
        UnknownArchitectureError: the model cannot be built, or its tree leaves a choice.
    """
    unknown = f"{directory}: architecture {architecture!r} is not supported"
    remedy = f"known are {', '.join(sorted(architectures()))}; of others name the matrix with --target-module"
    try:
        config = AutoConfig.from_pretrained(  # nosec B615 # of files of this disk
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what an arbitrary config makes transformers raise
        raise UnknownArchitectureError(f"{unknown}; {remedy}") from error
    found = {
        path: turned
        for path, turned in value_paths(model, layer_count(directory)).items()
        if stored_weight(checkpoint, path.replace(_PLACE, "0")) is not None
    }
    if len(found) != 1:
        candidates = f"its value matrix may be any of {', '.join(sorted(found))}" if found else "no matrix stands out"
        raise UnknownArchitectureError(f"{unknown}, and {candidates}; {remedy}")
    path, turned = next(iter(found.items()))
    layers, _, value = path.partition(f".{_PLACE}.")
    return Layout(architecture, layers, value, turned, known=False)


def value_paths(model: PreTrainedModel, count: int) -> dict[str, bool]:
    """Paths, with ``{layer}``, of all that may be the value matrix, and whether its weight is stored turned.

    Args:
        count: how many layers the model has.
    """
    config = model.config.get_text_config()
    widths = {getattr(config, name, None) for name in _WIDTHS} - {None}
    found = {}
    for layers in _layer_lists(model, count):
        each = [dict(_backward_maps(layer, config.hidden_size)) for layer in model.get_submodule(layers).children()]
        shared = {value: each[0][value] for value in each[0] if all(value in one for one in each)}
        exact = {value: one for value, one in shared.items() if one[0] in widths}
        for value, (_, turned) in (exact or shared).items():
            found[f"{layers}.{_PLACE}.{value}"] = turned
    return found


def _layer_lists(model: nn.Module, count: int) -> Iterator[str]:
    """Paths of the lists of layers: as long as the model is deep, and in no other list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+\.", f".{name}."):
            yield name


def _backward_maps(layer: nn.Module, width: int) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Linear maps inside a layer that come from another width to ``width``, with that width and how they are kept."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == width != module.in_features:
            yield name, (module.in_features, False)
        elif isinstance(module, Conv1D) and module.nf == width != module.weight.shape[0]:
            yield name, (module.weight.shape[0], True)
