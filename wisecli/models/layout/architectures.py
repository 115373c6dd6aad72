"""Where an architecture keeps its decoder layers and its value matrix; the table is ``architectures.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from wisecli.data.packaged import tomllib
from wisecli.errors import ModelError, UnknownArchitectureError, reason_of
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json
from wisecli.io.json_schema import shown

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 10**6
# No model has a longer side.
LONGEST_SIDE = 2**31
# What configs call the width of the residual stream.
WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "dim")
# How the layers above an edited one run by themselves: on from attention's keys and values, on whole rows of what
# leaves the edited layer, or only together with those below it.
Above = Literal["cached", "rows", "all"]
CACHED: Above = "cached"
ROWS: Above = "rows"
ALL: Above = "all"
# How torch spells types of eight bits, with which nothing is computed, and the type that takes their place.
_EIGHT_BITS, _IN_THEIR_PLACE = "float8_", "bfloat16"
DEFAULT_LOADER = "AutoModelForCausalLM"
_IMAGE_LOADER = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps its decoder layers and, in them, its value matrices.

    It is a row of the table, or what stands in for one. Without a ``value`` matrix edits are added behind a layer.
    ``norm`` is the module inside a layer that the matrix' output passes, ``multiplier`` what it is multiplied by,
    before it joins the residual stream. Of a layout that is not ``known`` neither is certain before a model is loaded,
    nor is how the layers ``above`` run, which module, by its path, is the ``decoder`` that is given the tokens, and
    along which axis the layers give several ``streams``.
    ``depth`` is the number of layers, where the config does not say it, and ``width`` that of the numbers in a state,
    where they are others than the config says. ``experts`` counts for each layer the numbers in its experts, and in one
    expert, where those can be read one by one.
    """

    architecture: str
    layers: str
    value: str | None = None
    transposed: bool = False
    norm: str | None = None
    multiplier: float = 1.0
    known: bool = True
    above: Above = CACHED
    decoder: str | None = None
    streams: int | None = None
    depth: int | None = None
    width: int | None = None
    experts: tuple[tuple[int, int], ...] = ()

    def behind_layers(self) -> Layout:
        """Return the same layers, for edits that are added behind one of them."""
        return replace(self, value=None, transposed=False, norm=None, multiplier=1.0)


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Return the table of known architectures, by ``model_type``."""
    return tomllib.loads(resources.files(__package__).joinpath("architectures.toml").read_text(encoding="utf-8"))


def known_layout(directory: Path) -> Layout:
    """Return the table's row for a model.

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
    named = {field.name: row[field.name] for field in fields(Layout) if field.name in row}
    return Layout(architecture, **{**named, "multiplier": float(settings.get(row.get("multiplier", ""), 1.0))})


def loader_name(architecture: str) -> str:
    """Return the name of the class of transformers that loads a model of this type with its head."""
    if (row := architectures().get(architecture)) is not None:
        return str(row.get("loader", DEFAULT_LOADER))
    from transformers.models.auto import modeling_auto  # with torch, which models with a row are planned without

    texts = architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = architecture in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return _IMAGE_LOADER if images and not texts else DEFAULT_LOADER


def text_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of the model that reads text: the whole, or its part for text with that type's defaults.

    Raises:
        ModelError: transformers knows no such part.
    """
    config = read_json(directory / "config.json")
    exported, text = config.get(EXPORTED_KEY), config.get("text_config")
    if not isinstance(text, dict):
        return config
    from transformers import CONFIG_MAPPING, AutoConfig

    architecture = str((exported if isinstance(exported, dict) else config).get("model_type"))
    if architecture not in architectures() and architecture not in CONFIG_MAPPING:
        return config
    # Of the settings themselves only the type: whatever else they say is checked before anything is built from them.
    typed = {"text_config": {"model_type": text["model_type"]}} if "model_type" in text else {}
    try:
        defaults = AutoConfig.for_model(architecture, **typed).get_text_config().to_dict()
    except Exception as error:  # what a strange type makes transformers raise
        reason = reason_of(error)
        raise ModelError(
            f"{directory}: transformers cannot read the text_config of config.json ({reason}); edit another model"
        ) from error
    return {**defaults, **text}


def layer_count(directory: Path) -> int:
    """Return how many layers a model has, from its ``config.json``.

    Raises:
        ModelError: that is no number of layers.
    """
    count = _stated(directory, _LAYER_COUNTS)
    if type(count) is not int or not 0 <= count <= _MOST_LAYERS:
        raise ModelError(f"{directory}: config.json has {str(count)[:40]!r} layers; is it this model's?")
    return count


def state_width(directory: Path) -> int:
    """Return how many numbers the residual stream has at a token, from a model's ``config.json``.

    Raises:
        ModelError: that is no such number.
    """
    width = _stated(directory, WIDTH_NAMES)
    if width == 0:
        raise ModelError(f"{directory}: config.json names no one width of the model's states; edit another model")
    if type(width) is not int or not 0 < width < LONGEST_SIDE:
        raise ModelError(f"{directory}: config.json has states of {str(width)[:40]!r} numbers; is it this model's?")
    return width


def class_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the completed settings of a directory's model, with a type that torch can compute in."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(  # nosec B615 # of files of this disk
        directory, trust_remote_code=trust_remote_code, local_files_only=True
    )
    if _EIGHT_BITS in str(found.dtype):
        found.dtype = _IN_THEIR_PLACE
    return found


def _stated(directory: Path, names: Sequence[str]) -> Any:
    """Return a setting that a config has under one of some names, or its class by the first of them; 0 without one."""
    config = text_settings(directory)
    if (found := next((config[name] for name in names if name in config), None)) is not None:
        return found
    try:
        return int(getattr(class_config(directory).get_text_config(), names[0]))
    except Exception:  # what a strange config makes transformers raise
        return 0


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """Return how the weights of a model are quantised, by its ``config.json``; ``None`` if they are plain numbers."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    settings = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    return None if settings is None else shown(settings.get("quant_method") if isinstance(settings, dict) else settings)


def computed_in(checkpoint: Checkpoint) -> str | None:
    """Return the type in which plain weights of eight bits are run; ``None`` for all other models."""
    config = read_json(checkpoint.directory / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    types = checkpoint.types if named is None else {str(named)}
    plain = quantisation_of(config) is None and any(_EIGHT_BITS in dtype for dtype in types)
    return _IN_THEIR_PLACE if plain else None


def stored_weight(checkpoint: Checkpoint, module: str) -> str | None:
    """Return the name of a module's weight in the checkpoint, which may lack the base model's prefix, or ``None``."""
    return stored_name(checkpoint, f"{module}.weight")


def stored_name(checkpoint: Checkpoint, parameter: str) -> str | None:
    """Return the name under which a checkpoint stores a parameter, if it does."""
    return next((spelling for spelling in spellings(parameter) if spelling in checkpoint), None)


def spellings(parameter: str) -> Iterator[str]:
    """Yield what checkpoints may call a parameter, or the start of several: without the prefix, or as in the table."""
    yield parameter
    yield parameter.split(".", 1)[1]
    for row in architectures().values():
        if "stored" in row and parameter.startswith(f"{row['layers']}."):
            yield row["stored"] + parameter.removeprefix(row["layers"])
