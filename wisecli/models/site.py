"""Where an architecture keeps its layers and its value matrix; the table is ``architectures.toml``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json, sha256_tensor
from wisecli.io.digest import sha256_json
from wisecli.io.json_schema import CLOSED, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 10**6
DEFAULT_LOADER = "AutoModelForCausalLM"
# The paper's best layers lie at about four fifths of the depth (section 3.3: layer 27 of 32), and so do ours.
AUTO_DEPTH = 0.8
# What prompts mean is read at this share of the depth: deep enough to know a word by its neighbours, and cheap.
_EARLY = 4 / 30


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps its value matrices: a row of the table, or what stands in for one.

    ``norm`` is the module inside a layer that the matrix' output passes, ``multiplier`` what it is multiplied by,
    before it joins the residual stream. Of a layout that is not ``known`` neither is certain before a model is loaded.
    """

    architecture: str
    layers: str
    value: str
    transposed: bool = False
    norm: str | None = None
    multiplier: float = 1.0
    known: bool = True


@dataclass(frozen=True)
class Site:
    """The edited matrix: ``W`` of shape ``(d, d_ff)`` in layer ``layer`` of an architecture.

    A change ``u`` of what the matrix gives changes what leaves the layer by ``multiplier · u``, or, where the output
    passes the module ``norm`` first, by what that makes of it.
    """

    __pydantic_config__ = CLOSED

    architecture: str
    layer: int
    layer_module: str
    module: str
    transposed: bool
    d: int
    d_ff: int
    norm: str | None = None
    multiplier: float = 1.0

    @property
    def weight(self) -> str:
        """Name of the weight tensor in the checkpoint."""
        return f"{self.module}.weight"

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight tensor in the checkpoint."""
        return (self.d_ff, self.d) if self.transposed else (self.d, self.d_ff)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as the manifests keep it."""
        return asdict(self)

    def below(self, layer: int) -> Site:
        """The matrix of a layer below, for the states that leave that layer."""
        path = f"{self.layer_module.rpartition('.')[0]}.{layer}"
        module = path + self.module[len(self.layer_module) :]
        return replace(self, layer=layer, layer_module=path, module=module, norm=None)

    def early(self, depth: int) -> int:
        """The number of the layer, of so many, whose states say what a prompt means; negative if none is below this."""
        return min(max(0, round(depth * _EARLY) - 1), self.layer - 1)


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model: its settings and the one matrix that is edited."""

    matrix: str
    config: str

    def as_dict(self) -> dict[str, str]:
        """JSON form, as the manifests keep it."""
        return asdict(self)


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """The table of known architectures, by ``model_type``."""
    return tomllib.loads(resources.files("wisecli.models").joinpath("architectures.toml").read_text(encoding="utf-8"))


def known_layout(directory: Path) -> Layout:
    """The table's row for a model.

    Raises:
        UnknownArchitectureError: the architecture has no row in the table.
    """
    architecture = str(read_json(directory / "config.json").get("model_type"))[:80]
    table = architectures()
    known = ", ".join(sorted(table))
    if architecture not in table:
        raise UnknownArchitectureError(
            f"{directory}: architecture {architecture!r} is not supported; known are {known}"
        )
    row, settings = table[architecture], text_settings(directory)
    if "value" not in row:
        tower = str(settings.get("model_type"))[:80]
        own = table.get(tower, {})
        if "value" not in own or not row["stored"].endswith(f".{own['layers']}"):
            raise UnknownArchitectureError(f"{directory}: text model {tower!r} is not supported; known are {known}")
        row = {**own, **row}
    named = {one.name: row[one.name] for one in fields(Layout) if one.name in row}
    return Layout(architecture, **{**named, "multiplier": float(settings.get(row.get("multiplier", ""), 1.0))})


def loader_name(architecture: str) -> str:
    """Name of the class of transformers that loads a model of this type with its head."""
    name: str = architectures().get(architecture, {}).get("loader", DEFAULT_LOADER)
    return name


def text_settings(directory: Path) -> dict[str, Any]:
    """Settings of the model that reads text: of the whole, or of its part for text with that type's defaults.

    Raises:
        ModelError: transformers knows no such part.
    """
    config = read_json(directory / "config.json")
    exported, text = config.get(EXPORTED_KEY), config.get("text_config")
    architecture = (exported if isinstance(exported, dict) else config).get("model_type")
    if not isinstance(text, dict) or architecture not in architectures():
        return config
    from transformers import AutoConfig

    # Of the settings themselves only the type: whatever else they say is checked before anything is built from them.
    typed = {"text_config": {"model_type": text["model_type"]}} if "model_type" in text else {}
    try:
        defaults = AutoConfig.for_model(architecture, **typed).get_text_config().to_dict()
    except Exception as error:  # what a strange type makes transformers raise
        raise ModelError(f"{directory}: config.json has a text_config of no known type") from error
    return {**defaults, **text}


def find_site(directory: Path, checkpoint: Checkpoint, layer: str | int = "auto", layout: Layout | None = None) -> Site:
    """The value matrix of one layer, from the model's ``config.json`` and the weight headers alone.

    Args:
        layer: a layer's index, or ``auto`` for the one at four fifths of the depth.
        layout: where the architecture keeps its matrices, if not where the table says.

    Raises:
        UnknownArchitectureError: the architecture has no row in the table.
        SettingsError: the model has no such layer.
        ModelError: the checkpoint does not hold the matrix, or the model is too shallow.
    """
    layout = layout or known_layout(directory)
    index = _layer_index(directory, layer, layer_count(directory))
    layer_module = f"{layout.layers}.{index}"
    module = f"{layer_module}.{layout.value}"
    weight = stored_weight(checkpoint, module)
    if weight is None:
        raise ModelError(f"{directory}: the checkpoint holds no tensor {module}.weight; is config.json this model's?")
    shape = checkpoint.shape(weight)
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{directory}: tensor {weight} is no matrix; is config.json this model's?")
    d_ff, d = shape if layout.transposed else shape[::-1]
    norm = f"{layer_module}.{layout.norm}" if layout.norm else None
    return Site(layout.architecture, index, layer_module, module, layout.transposed, d, d_ff, norm, layout.multiplier)


def layer_count(directory: Path) -> int:
    """How many layers a model has, from its ``config.json``.

    Raises:
        ModelError: that is no number of layers.
    """
    config = text_settings(directory)
    count = next((config[name] for name in _LAYER_COUNTS if name in config), 0)
    if type(count) is not int or not 0 <= count <= _MOST_LAYERS:
        raise ModelError(f"{directory}: config.json has {str(count)[:40]!r} layers; is it this model's?")
    return count


def _layer_index(directory: Path, layer: str | int, count: int) -> int:
    if count < 2:
        raise ModelError(
            f"{directory}: config.json names fewer than two layers, and one must stay above the edited one"
        )
    if layer == "auto":
        return max(0, min(round(AUTO_DEPTH * count), count - 2))
    try:
        index = int(layer)
    except ValueError:
        raise SettingsError(f"--layer must be `auto` or a number, not {layer!r}") from None
    if not 0 <= index < count - 1:
        raise SettingsError(f"--layer {index} is out of range: choose 0 to {count - 2}, or auto")
    return index


def stored_weight(checkpoint: Checkpoint, module: str) -> str | None:
    """A module's weight as the checkpoint spells it: GPT-2's leave the base model's prefix out; ``None`` if absent."""
    return stored_name(checkpoint, f"{module}.weight")


def stored_name(checkpoint: Checkpoint, parameter: str) -> str | None:
    """The same for any parameter."""
    return next((spelling for spelling in spellings(parameter) if spelling in checkpoint), None)


def spellings(parameter: str) -> Iterator[str]:
    """What checkpoints may call a parameter, or the start of several: without the prefix, or as the table says."""
    yield parameter
    yield parameter.split(".", 1)[1]
    for row in architectures().values():
        if "stored" in row and parameter.startswith(f"{row['layers']}."):
            yield row["stored"] + parameter.removeprefix(row["layers"])


def load_matrix(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """The base matrix ``W`` as stored, turned to ``(d, d_ff)``."""
    weight = checkpoint.load(stored_weight(checkpoint, site.module) or site.weight)
    return weight.T if site.transposed else weight


def fingerprint(directory: Path, checkpoint: Checkpoint, site: Site) -> Fingerprint:
    """Identify a base model by its settings and the edited matrix."""
    config = read_json(directory / "config.json")
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    return Fingerprint(sha256_tensor(load_matrix(checkpoint, site)), sha256_json(config))


def value_module(model: nn.Module, site: Site) -> nn.Module:
    """The module that holds the edited matrix in a loaded model."""
    return model.get_submodule(site.module)


# No model has a longer side.
_LONGEST_SIDE = 2**31


def check_site(site: Site) -> None:
    """Check that a site which a manifest describes can be one.

    Raises:
        ValueError: saying what cannot be right.
    """
    if not (0 < site.d < _LONGEST_SIDE and 0 < site.d_ff < _LONGEST_SIDE):
        raise ValueError(f"`site` has a matrix of {site.d}×{site.d_ff}")
    nested = site.module.startswith(f"{site.layer_module}.") and site.layer_module.endswith(f".{site.layer}")
    if site.layer < 0 or not nested:
        raise ValueError(f"`site.module` {shown(site.module)} is not in layer {site.layer}")
