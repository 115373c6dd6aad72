"""Frozen settings, presets, and which source wins: defaults < preset < file < environment ``WISE_*`` < flag."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from wisecli.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class LoadOptions:
    """Which revision of a model is loaded, where and how.

    ``device`` is ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``dtype`` a type's name, or ``auto`` for the
    checkpoint's own. ``trust_remote_code`` lets code of the model's directory run. ``memory_budget`` is about how many
    bytes there are, by default all that the device has; of a model that does not fit, layers are read as they run.
    ``revision`` is that of a model on the hub.
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    memory_budget: int | None = None
    revision: str | None = None


@dataclass(frozen=True)
class EditSettings:
    """How shards are written: in closed form, or by the paper's gradient steps.

    The margins α, β, γ and the router's loss are section 3.1, equation 5, of the paper.
    """

    preset: Literal["default", "paper"] = "default"
    writer: Literal["solve", "gradient"] = "solve"
    schedule: Literal["batched", "sequential"] = "batched"
    layer: str = "auto"
    shards: int | None = None
    edits_per_shard: int = 100
    mask_ratio: float = 0.5  # half the columns hold a hundred edits; a fifth, as in the paper, does not
    mask_kind: Literal["columns", "elements"] = "columns"
    masks: Literal["random", "disjoint"] = "random"
    passes: int = 60
    learning_rate: float = 2e-2
    batch_size: int = 32
    contexts: int = 1  # more of them cost time and change nothing: .853 of rephrases right with 4, .855 with 0
    context_tokens: int = 8
    chat: bool = False
    augment: int = 0  # paraphrases that the model writes itself
    residual_steps: int = 40
    residual_rate: float = 0.3  # in units of an entry of W a
    residual_stop: float = 0.02  # the loss that every target token of an edit must come under
    polish: int = 5
    polish_rate: float = 5e-3
    alpha: float = 0.25
    beta: float = 1.0
    gamma: float = 0.5
    margin_unit: Literal["output", "absolute"] = "output"  # `output`: the median of ‖W a‖ over unrelated text
    norm_constraint: float | None = None
    stop_loss: float = 0.05
    train_end: bool = True
    unrelated_texts: int = 600
    router: Literal["key", "norm"] = "key"
    routing: Literal["token", "sequence"] = "token"
    threshold: Literal["false-alarm", "minimum"] = "false-alarm"
    seed: int = 0


@dataclass(frozen=True)
class MergeSettings:
    """How shards become one memory. What the shards' own settings decide is left ``None`` here."""

    mode: Literal["merge", "retrieve", "lookup"] | None = None
    method: str = "ties"
    refit: bool | None = None
    density: float = 0.5
    scale: float = 1.0
    weights: tuple[float, ...] | None = None
    router: Literal["key", "norm"] | None = None
    routing: Literal["token", "sequence"] | None = None
    threshold: Literal["false-alarm", "minimum"] | None = None
    false_alarm: float | None = None
    subjects: Literal["named", "any"] = "named"
    sharpness: float = 0.0  # the nearest key alone: a mean over keys loses edits that are alike
    seed: int = 0


@dataclass(frozen=True)
class EvalSettings:
    """How figures are measured."""

    dataset: str | None = None
    edits: int | None = None
    batch_size: int = 32
    chat: bool = False
    generate: bool = True
    max_new_tokens: int | None = None  # the longest target and a little more


@dataclass(frozen=True)
class BenchSettings:
    """Which methods are compared, on what, and how; or which studies are made, and of what."""

    dataset: str | None = None
    methods: str = "wise,wise-retrieve,ft-l,rome,memit,grace,rag"
    study: str | None = None
    counts: str = "10,100"
    generate: bool = True
    batch_size: int = 32
    resamples: int = 1000
    layers: int = 8
    mask_ratios: str = ".1,.2,.3,.5,.8"
    shard_counts: str = "1,2,3,5,8"
    edits_per_shard: int | None = None  # as in editing, but no more than a quarter, so that there are several shards
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Section 4.1 and appendix B: one edit after the other, stochastic gradient descent.
    "paper": {
        "writer": "gradient",
        "schedule": "sequential",
        "mask_ratio": 0.2,
        "mask_kind": "elements",
        "passes": 70,
        "contexts": 2,
        "learning_rate": 1.0,
        "alpha": 5.0,
        "beta": 20.0,
        "gamma": 10.0,
        "margin_unit": "absolute",
        "norm_constraint": 1.0,
        "train_end": False,
        "router": "norm",
        "routing": "sequence",
        "threshold": "minimum",
    },
}

# Values outside these bounds are refused: (lowest, highest), both allowed unless 0 makes no sense.
_BOUNDS: dict[str, tuple[float, float]] = {
    "shards": (1, 10**6),
    "edits_per_shard": (1, 10**6),
    "mask_ratio": (1e-9, 1),
    "passes": (1, 10**6),
    "learning_rate": (1e-12, 1e6),
    "batch_size": (1, 10**6),
    "contexts": (0, 1000),
    "context_tokens": (1, 1000),
    "augment": (0, 100),
    "residual_steps": (1, 10**4),
    "residual_rate": (1e-9, 1e3),
    "residual_stop": (1e-9, 10),
    "polish": (0, 10**4),
    "polish_rate": (1e-12, 1e6),
    "sharpness": (0, 1e4),
    "unrelated_texts": (8, 10**6),
    "density": (1e-9, 1),
    "false_alarm": (0, 0.5),
    "edits": (1, 10**9),
    "resamples": (10, 10**6),
    "layers": (1, 10**4),
    "max_new_tokens": (1, 10**6),
}


_TRUTH = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}


def resolve(kind: type[Settings], flags: Mapping[str, Any], *, section: str, file: Path | None = None) -> Settings:
    """Settings from all their sources.

    Args:
        kind: the settings class.
        flags: what the command line gave; ``None`` counts as not given, and what is no setting is passed over.
        section: the table of the settings file to read.
        file: a TOML file with one table a command.

    Raises:
        SettingsError: an unknown name, a value of the wrong kind or out of bounds.
    """
    hints = get_type_hints(kind)
    given = {**_from_file(file, section, hints), **_from_environment(hints)}
    given.update({name: value for name, value in flags.items() if name in hints and value is not None})
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise SettingsError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    base = {name: value for name, value in PRESETS[preset].items() if name in hints}
    values = {name: _checked(name, value, hints[name]) for name, value in {**base, **given}.items()}
    return kind(**values)


def settings_from(kind: type[Settings], record: Mapping[str, Any]) -> Settings:
    """Settings as a manifest keeps them.

    Raises:
        SettingsError: an unknown name, a value of the wrong kind or out of bounds.
    """
    hints = get_type_hints(kind)
    known = {name: value for name, value in record.items() if value is not None}
    if unknown := sorted(known.keys() - hints.keys()):
        raise SettingsError(f"the manifest has a setting {unknown[0]!r} that this version does not know")
    return kind(**{name: _checked(name, value, hints[name]) for name, value in known.items()})


def defaults(kind: type[Any]) -> dict[str, Any]:
    """Every setting's default."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _from_file(file: Path | None, section: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get(section, {})
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: not readable as TOML ({error})") from None
    if not isinstance(table, dict):
        raise SettingsError(f"{file}: {section} must be a table, [{section}]")
    given = {name.replace("-", "_"): value for name, value in table.items()}
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        raise SettingsError(f"{file}: [{section}] has no setting {unknown[0]!r}; known are {', '.join(sorted(hints))}")
    return given


def _from_environment(hints: Mapping[str, Any]) -> dict[str, Any]:
    names = {f"WISE_{name.upper()}": name for name in hints}
    return {name: os.environ[variable] for variable, name in names.items() if os.environ.get(variable)}


def _checked(name: str, value: Any, hint: Any) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)] or [hint]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
    else:
        choices = get_args(options[0]) if get_origin(options[0]) is Literal else ()
    if choices:
        if value not in choices:
            raise SettingsError(f"{_flag(name)} must be one of {', '.join(choices)}, not {value!r}")
        return value
    converted = _converted(name, value, options[0])
    if name in _BOUNDS and converted is not None:
        lowest, highest = _BOUNDS[name]
        if not lowest <= converted <= highest:
            raise SettingsError(f"{_flag(name)} must lie between {lowest:g} and {highest:g}, not {converted!r}")
    return converted


def _converted(name: str, value: Any, kind: Any) -> Any:
    if value is None:
        return None
    try:
        if get_origin(kind) is tuple:
            return tuple(float(item) for item in (value.split(",") if isinstance(value, str) else value))
        if kind is bool and not isinstance(value, bool):
            return _TRUTH[str(value).lower()]
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise SettingsError(f"{_flag(name)} must be {kind.__name__}, not {value!r}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
