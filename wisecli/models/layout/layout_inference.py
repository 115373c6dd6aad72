"""Where a model without a row in ``architectures.toml`` keeps its layers or its value matrix, if it has one.

The model is built on the meta device, where weights take no memory. In each layer the value matrix is the one linear
map from the width of the feed-forward layer back to that of the residual stream. How its output joins the stream is
seen once the model is loaded: a change of the output must reach the layer's own as it is, times a constant, or through
one norm. A lookup needs no matrix: it is put behind a decoder layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wisecli.config import LoadOptions
from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json
from wisecli.io.json_schema import shown
from wisecli.models.layout.architectures import (
    WIDTH_NAMES,
    Layout,
    architectures,
    known_layout,
    quantisation_of,
    stored_weight,
    text_settings,
)
from wisecli.progress import ProgressCallback, ignore_progress

# Settings that count the experts of a layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "n_experts")
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
    """Return where a model keeps its layers and matrices: from the setting, the table or the module tree.

    Args:
        target_module: path of the value matrix, with ``{layer}`` in the place of the layer's index; or of the layers
            themselves, behind which edits are then added.
        lookup: whether edits go behind a layer, unless ``target_module`` names a matrix.
        load: whether the model's own code may run, to see its module tree.

    Raises:
        ModelError: the model is quantised or a mixture of experts, and a matrix is needed.
        SettingsError: ``target_module`` has no place for the index, or names layers where a matrix is needed.
        UnknownArchitectureError: without a row for it, the module tree leaves a choice, or holds a whole text model.
    """
    config = read_json(directory / "config.json")
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{directory} is an encoder-decoder model, or half of one; edit a model that is a decoder alone"
        )
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
    if (row := _row_of(directory, lookup=lookup) if known else None) is not None:
        # How quantised layers run is probed.
        return replace(row.behind_layers(), known=without is None) if lookup else row
    if EXPORTED_KEY in config:
        raise UnknownArchitectureError(f"{directory} is an exported model; edit the base model that it was made from")
    from wisecli.models.layout.module_tree import read_off  # takes long, and most models are known

    return read_off(directory, checkpoint, config, lookup=lookup, load=load, on_progress=on_progress)


def _row_of(directory: Path, *, lookup: bool) -> Layout | None:
    """Return the table's row for a model; ``None`` where a lookup does without, for text models that have none."""
    try:
        return known_layout(directory)
    except UnknownArchitectureError:
        if not lookup:
            raise
        return None


def _around_text() -> Iterator[str]:
    """Return the architectures of the table whose text model is part of another model."""
    return (name for name, row in architectures().items() if "loader" in row)


def why_no_matrix(directory: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """Return why the feed-forward layers of a model are no single matrix of plain numbers; ``None`` if they may be."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if quantisation_of(config) is not None:
        return (
            f"{directory} is a quantised model, whose matrices cannot be changed by a little: keep edits as a lookup "
            "(--set site=layer), or edit the model it was quantised from and quantise what `wise export` writes"
        )
    counts = [part.get(name) for part in parts for name in _EXPERTS]
    experts = any(isinstance(count, int) and count > 1 for count in counts)
    if experts or any(".experts." in name for name in checkpoint):
        return (
            f"{directory} is a mixture of experts, which has no one value matrix a layer: keep edits as a lookup "
            "(--set site=layer), or choose a dense model of the same family"
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
