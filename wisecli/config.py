"""Frozen settings, presets, and which source wins: defaults < preset < file < environment ``WISE_*`` < flag."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from wisecli.errors import SettingsError
from wisecli.retired_settings import RETIRED, with_current_names
from wisecli.validated_settings import Bounds, Validated, read_toml

Settings = TypeVar("Settings")

PREFIX = "WISE_"  # of the names of environment variables
Count = Annotated[int, Bounds(1, 10**6)]
Share = Annotated[float, Bounds(1e-9, 1)]
Rate = Annotated[float, Bounds(1e-12, 1e6)]
Margin = Annotated[float, Bounds(0, 1e6)]
Weight = Annotated[float, Bounds(-1e3, 1e3)]
Seed = Annotated[int, Bounds(0, 2**53 - 1)]
# A lookup of facts, one matrix for all shards, or a matrix a shard.
Mode = Literal["lookup", "merge", "retrieve"]
# Where edits are written: behind a decoder layer or in a value matrix; `auto` is a layer where a lookup is meant.
SiteName = Literal["auto", "layer", "matrix"]
# Of a matrix: whether a prompt is judged by the mean over its tokens or by its last one.
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class LoadOptions:
    """Which revision of a model is loaded, where and how.

    ``device`` is ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``dtype`` a type's name, or ``auto`` for the
    checkpoint's own. ``trust_remote_code`` lets code of the model's directory run. ``memory_budget`` is about how many
    bytes there are, by default all that the device has; of a model that does not fit, layers are read as they run.
    ``revision`` is that of a model on the hub. ``date`` is the day that chat templates are told, today by default.
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    memory_budget: int | None = None
    revision: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class EditSettings(Validated):
    """How shards are written: in closed form, or by the paper's gradient steps.

    The margins α, β, γ and the router's loss are section 2.3.1, equation 5, of the paper.
    """

    preset: Literal["default", "paper"] = "default"
    writer: Literal["solve", "gradient"] = "solve"
    schedule: Literal["batched", "sequential"] = "batched"
    layer: str = "auto"
    site: SiteName = "auto"
    shards: Count | None = None
    edits_per_shard: Count = 100
    mask_ratio: Share = 0.5  # half the columns hold a hundred edits; a fifth, as in the paper, does not
    mask_kind: Literal["columns", "elements"] = "columns"
    masks: Literal["random", "disjoint"] = "random"
    passes: Count = 60
    learning_rate: Rate = 2e-2
    batch_size: Count = 32
    contexts: Annotated[int, Bounds(0, 1000)] = 1  # with 4 of them .853 of rephrases are right, with none .855
    context_tokens: Annotated[int, Bounds(1, 1000)] = 8
    chat: bool = False
    augment: Annotated[int, Bounds(0, 100)] = 0  # paraphrases that the model writes itself
    residual_steps: Annotated[int, Bounds(1, 10**4)] = 40
    residual_more: Annotated[int, Bounds(0, 10**4)] = 400  # steps for answers that are not the likeliest after those
    residual_rate: Annotated[float, Bounds(1e-9, 1e3)] = 0.3  # in units of an entry of W a, or of a third of a state's
    residual_stop: Annotated[float, Bounds(1e-9, 10)] = 0.02  # a loss that every target token must come under
    polish: Annotated[int, Bounds(0, 10**4)] | None = None  # 5, but none where a lookup is meant, which has no matrix
    polish_rate: Rate = 5e-3
    alpha: Margin = 0.25
    beta: Margin = 1.0
    gamma: Margin = 0.5
    margin_unit: Literal["output", "absolute"] = "output"  # `output`: the median of ‖W a‖ over unrelated text
    norm_of: Literal["update", "activated"] = "update"  # `activated`: of σ(W a + Δ a) - σ(W a), with the model's σ
    padding: Literal["left-out", "counted"] = "left-out"  # in the means of the sequential schedule
    prefixes: Literal["sampled", "greedy"] = "sampled"
    weight_decay: Annotated[float, Bounds(0, 1)] = 0.0  # of the sequential schedule
    norm_constraint: Rate | None = None
    stop_loss: Margin = 0.05
    train_end: bool = True
    unrelated_texts: Annotated[int, Bounds(8, 10**6)] = 600
    in_forms: bool | None = None  # trained in those that people ask in, if a closed form writes
    pooling: Pooling = "last"
    threshold: Literal["false-alarm", "minimum"] = "false-alarm"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_forms is None:
            object.__setattr__(self, "in_forms", self.by_facts)
        if self.polish is None:
            object.__setattr__(self, "polish", 0 if self.in_forms or self.site == "layer" else 5)

    @property
    def by_facts(self) -> bool:
        """Whether edits are routed by what a prompt asks, rather than by a norm."""
        return self.writer == "solve"

    @property
    def for_lookup(self) -> bool:
        """Whether a lookup is meant, which reads no matrix: then none is solved for."""
        return self.by_facts and (self.site == "layer" or (bool(self.in_forms) and not self.polish))

    @property
    def behind_layer(self) -> bool:
        """Whether edits go behind a decoder layer, unless a matrix is named."""
        return self.site != "matrix" and self.for_lookup

    @property
    def sequential(self) -> bool:
        """Whether gradient steps are taken for one edit after the other, as in the paper; shards then keep means."""
        return (self.writer, self.schedule) == ("gradient", "sequential")

    @property
    def background_texts(self) -> int:
        """How many unrelated texts are read: a third for a lookup, of which other texts tell what opens it."""
        return min(self.unrelated_texts, max(16, self.unrelated_texts // (3 if self.for_lookup else 1)))


@dataclass(frozen=True)
class EditRunSettings(Validated):
    """How one run of editing goes: nothing of it is kept with the shards."""

    executor: str = "local"
    only: str | None = None
    interval: Annotated[float, Bounds(0.01, 1e6)] = 1.0
    target_module: str | None = None
    allow_special_tokens: bool = False


@dataclass(frozen=True)
class MergeSettings(Validated):
    """How shards become one memory. What the shards' own settings decide is left ``None`` here."""

    mode: Mode | None = None
    method: str = "ties"
    refit: bool | None = None
    density: Share = 0.5
    scale: Weight = 1.0
    weights: tuple[Weight, ...] | None = None
    pooling: Pooling | None = None
    norm_of: Literal["update", "activated"] | None = None
    threshold: Literal["false-alarm", "minimum"] | None = None
    false_alarm: Annotated[float, Bounds(0, 0.5)] | None = None
    subjects: Literal["named", "any"] = "named"
    # What just does after an edit's own prompt is too little after some rephrases; 1.7 is too much.
    strength: Annotated[float, Bounds(0.1, 10)] = 1.3
    seed: Seed = 0

    @property
    def for_lookup(self) -> bool:
        """Whether the memory is to be a lookup, and no matrix."""
        return self.mode == "lookup"


@dataclass(frozen=True)
class EvalSettings(Validated):
    """How figures are measured."""

    dataset: str | None = None
    edits: Annotated[int, Bounds(1, 10**9)] | None = None
    protocol: Literal["forms", "wild", "teacher", "forms,wild"] = "forms"
    forms: str = "all"
    kinds: str = "all"
    ask: Count = 5
    before: bool = False
    batch_size: Count = 32
    chat: bool = False
    generate: bool = True
    max_new_tokens: Count | None = None  # the longest target and a little more


@dataclass(frozen=True)
class BenchSettings(Validated):
    """Which methods are compared, on what, and how; or which studies are made."""

    dataset: str | None = None
    methods: str = "wise,wise-retrieve,ft-l,rome,memit,grace,rag"
    study: str | None = None
    counts: str = "10,100"
    protocol: Literal["forms", "wild", "teacher", "forms,wild"] = "forms"
    forms: str = "all"
    kinds: str = "all"
    ask: Count = 10
    generate: bool = True
    batch_size: Count = 32
    resamples: Annotated[int, Bounds(10, 10**6)] = 1000
    layers: Annotated[int, Bounds(1, 10**4)] = 8
    mask_ratios: str = ".1,.2,.3,.5,.8"
    shard_counts: str = "1,2,3,5,8"
    edits_per_shard: Count | None = None  # as in editing, but no more than a quarter, so that there are several shards
    seed: Seed = 0


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Appendix A.3: one edit after the other, stochastic gradient descent.
    "paper": {
        "writer": "gradient",
        "schedule": "sequential",
        "mask_ratio": 0.2,
        "mask_kind": "elements",
        "passes": 70,
        "contexts": 10,
        "learning_rate": 1.0,
        "alpha": 5.0,
        "beta": 20.0,
        "gamma": 10.0,
        "margin_unit": "absolute",
        # As in the authors' code; the paper's text says nothing of these.
        "norm_of": "activated",
        "padding": "counted",
        "prefixes": "greedy",
        "weight_decay": 1e-5,
        "norm_constraint": 1.0,
        "stop_loss": 0.02,
        "train_end": False,
        "pooling": "mean",
        "threshold": "minimum",
    },
}


def resolve(kind: type[Settings], flags: Mapping[str, Any], *, section: str, file: Path | None = None) -> Settings:
    """Return settings from all their sources.

    Args:
        kind: the settings class.
        flags: what the command line gave; ``None`` counts as not given, and what is no setting is passed over.
        section: the table of the settings file to read.
        file: a TOML file with one table a command.

    Raises:
        SettingsError: an unknown name, a value of the wrong kind or out of bounds.
    """
    hints = get_type_hints(kind)
    written = {name: value for name, value in _from_file(file, section, hints).items() if name in hints}
    given = {**written, **_from_environment(hints)}
    given.update(
        {name: value for name, value in with_current_names(flags, hints).items() if name in hints and value is not None}
    )
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise SettingsError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    base = {name: value for name, value in PRESETS[preset].items() if name in hints}
    return kind(**{**base, **given})


def settings_from(kind: type[Settings], record: Mapping[str, Any]) -> Settings:
    """Return the settings that a manifest keeps.

    Raises:
        SettingsError: an unknown name, a value of the wrong kind or out of bounds.
    """
    hints = get_type_hints(kind)
    known = {name: value for name, value in with_current_names(record, hints).items() if value is not None}
    if unknown := sorted(known.keys() - hints.keys()):
        raise SettingsError(f"the manifest has a setting {unknown[0]!r} that this version does not know")
    return kind(**known)


def defaults(kind: type[Any]) -> dict[str, Any]:
    """Return every setting's default."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _from_file(file: Path | None, section: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a section of a configuration file, under today's names."""
    if file is None:
        return {}
    table = read_toml(file).get(section, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{file}: {section} must be a table, [{section}]")
    known = get_type_hints(EditSettings) | get_type_hints(EditRunSettings) if section == "edit" else hints
    given = with_current_names({name.replace("-", "_"): value for name, value in table.items()}, known)
    if unknown := sorted(given.keys() - known.keys()):
        meant = "".join(f"did you mean {close!r}? " for close in get_close_matches(unknown[0], known, n=1))
        names = ", ".join(sorted(known))
        raise SettingsError(f"{file}: [{section}] has no setting {unknown[0]!r}; {meant}known are {names}")
    return given


def _from_environment(hints: Mapping[str, Any]) -> dict[str, Any]:
    names = {f"{PREFIX}{name.upper()}": name for name in (*hints, *RETIRED)}
    given = {name: os.environ[variable] for variable, name in names.items() if os.environ.get(variable)}
    return with_current_names(given, hints)
