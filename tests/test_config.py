import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from wisecli.config import PRESETS, EditSettings, EvalSettings, MergeSettings, defaults, resolve, settings_from
from wisecli.errors import SettingsError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (EditSettings, MergeSettings, EvalSettings):
        for field in dataclasses.fields(kind):
            monkeypatch.delenv(f"WISE_{field.name.upper()}", raising=False)


def written(directory: Path, text: str) -> Path:
    path = directory / "wise.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(kind: type[Any], flags: dict[str, Any], *, section: str = "edit", file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        resolve(kind, flags, section=section, file=file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sources", "passes"),
    [
        ((), 60),
        (("preset",), 70),
        (("file",), 51),
        (("preset", "file"), 51),
        (("environment",), 62),
        (("preset", "environment"), 62),
        (("preset", "file", "environment"), 62),
        (("flag",), 83),
        (("file", "flag"), 83),
        (("preset", "file", "environment", "flag"), 83),
    ],
    ids=lambda value: "<".join(value) if isinstance(value, tuple) else None,
)
def test_the_later_source_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], passes: int
) -> None:
    flags: dict[str, Any] = {"preset": "paper"} if "preset" in sources else {}
    file = written(tmp_path, "[edit]\npasses = 51\n") if "file" in sources else None
    if "environment" in sources:
        monkeypatch.setenv("WISE_PASSES", "62")
    if "flag" in sources:
        flags["passes"] = 83
    assert resolve(EditSettings, flags, section="edit", file=file).passes == passes


@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_a_preset_may_come_from_any_source_and_stays_below_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    preset = 'preset = "paper"\n' if source == "file" else ""
    file = written(tmp_path, f"[edit]\n{preset}alpha = 3.5\n")
    if source == "environment":
        monkeypatch.setenv("WISE_PRESET", "paper")
    flags = {"preset": "paper"} if source == "flag" else {}
    settings = resolve(EditSettings, flags, section="edit", file=file)
    assert (settings.preset, settings.alpha, settings.beta) == ("paper", 3.5, 20.0)


def test_the_preset_of_a_flag_beats_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISE_PRESET", "paper")
    assert resolve(EditSettings, {"preset": "default"}, section="edit") == EditSettings()


def test_the_paper_preset_holds_what_the_authors_code_has() -> None:
    settings = resolve(EditSettings, {"preset": "paper"}, section="edit")
    margins = (settings.alpha, settings.beta, settings.gamma, settings.norm_constraint, settings.margin_unit)
    assert margins == (5.0, 20.0, 10.0, 1.0, "absolute")
    assert (settings.norm_of, settings.padding, settings.prefixes) == ("activated", "counted", "greedy")
    assert settings.weight_decay == 1e-5
    assert (settings.schedule, settings.mask_ratio, settings.mask_kind) == ("sequential", 0.2, "elements")
    assert (settings.writer, settings.passes, settings.learning_rate) == ("gradient", 70, 1.0)
    assert (settings.in_forms, settings.pooling, settings.threshold) == (False, "mean", "minimum")


def test_the_default_writes_in_closed_form_and_the_paper_preset_brings_ten_contexts() -> None:
    default, paper = (resolve(EditSettings, {"preset": preset}, section="edit") for preset in ("default", "paper"))
    assert (default.writer, default.contexts, default.chat) == ("solve", 1, False)
    assert (paper.writer, paper.contexts, paper.chat) == ("gradient", 10, False)


def test_merging_leaves_to_the_shards_what_is_not_given() -> None:
    settings = resolve(MergeSettings, {}, section="merge")
    left = (settings.mode, settings.refit, settings.pooling, settings.threshold)
    assert left == (None, None, None, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_its_own_checks(preset: str) -> None:
    settings = resolve(EditSettings, {"preset": preset}, section="edit")
    assert {name: getattr(settings, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("kind", [EditSettings, MergeSettings, EvalSettings])
def test_without_any_source_the_defaults_hold(kind: type[Any]) -> None:
    settings = resolve(kind, {}, section="any")
    assert settings == kind()
    # What other settings decide is filled in.
    decided = {"in_forms": True, "polish": 0} if kind is EditSettings else {}
    assert dataclasses.asdict(settings) == {**defaults(kind), **decided}


@pytest.mark.parametrize(("given", "passes"), [({}, 0), ({"in_forms": False}, 5), ({"polish": 3}, 3)])
def test_what_a_lookup_is_to_hold_is_not_polished_unless_that_is_asked_for(given: dict[str, Any], passes: int) -> None:
    assert EditSettings(**given).polish == passes


@pytest.mark.parametrize(
    ("given", "in_forms", "pooling"),
    [
        ({}, True, "last"),
        ({"writer": "gradient"}, False, "last"),
        ({"in_forms": False}, False, "last"),
        # As version 0.1 called them.
        ({"router": "meaning", "routing": "token"}, True, "last"),
        ({"router": "key", "routing": "sequence"}, False, "last"),
        ({"router": "norm", "routing": "mean"}, False, "mean"),
        ({"router": "key", "sharpness": 3.0}, False, "last"),
    ],
)
def test_what_edits_are_trained_in_goes_with_the_rest(given: dict[str, Any], in_forms: bool, pooling: str) -> None:
    for settings in (resolve(EditSettings, given, section="edit"), settings_from(EditSettings, given)):
        assert (settings.in_forms, settings.pooling) == (in_forms, pooling)


@pytest.mark.parametrize("kind", [EditSettings, MergeSettings, EvalSettings])
def test_the_defaults_pass_the_checks_when_they_are_given(kind: type[Any]) -> None:
    assert resolve(kind, defaults(kind), section="any") == kind()


def test_settings_are_checked_however_they_are_made() -> None:
    with pytest.raises(SettingsError):
        EditSettings(passes=0)
    with pytest.raises(SettingsError):
        dataclasses.replace(EditSettings(), writer="nobody")  # type: ignore[arg-type]


def test_of_several_mistakes_the_first_field_is_named() -> None:
    assert refusal(EditSettings, {"batch_size": 0, "passes": "many"}) == "passes must be a whole number, not 'many'"
    assert refusal(EditSettings, {"batch_size": "0"}) == "batch_size must lie between 1 and 1e+06, not 0"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EditSettings().passes = 3  # type: ignore[misc]


def test_flags_that_are_not_given_or_no_settings_are_passed_over() -> None:
    assert resolve(EditSettings, {"passes": None, "output": "x", "force": True}, section="edit") == EditSettings()


def test_an_empty_variable_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISE_PASSES", "")
    assert resolve(EditSettings, {}, section="edit").passes == 60


@pytest.mark.parametrize(
    ("kind", "variable", "text", "value"),
    [
        (EditSettings, "WISE_PASSES", "7", 7),
        (EditSettings, "WISE_MASK_RATIO", "0.25", 0.25),
        (EditSettings, "WISE_LAYER", "12", "12"),
        (EditSettings, "WISE_SHARDS", "3", 3),
        (EditSettings, "WISE_NORM_CONSTRAINT", "1.5", 1.5),
        (EditSettings, "WISE_TRAIN_END", "false", False),
        (EditSettings, "WISE_TRAIN_END", "1", True),
        (EditSettings, "WISE_WRITER", "gradient", "gradient"),
        (EditSettings, "WISE_CHAT", "yes", True),
        (EditSettings, "WISE_POLISH", "0", 0),
        (MergeSettings, "WISE_MODE", "lookup", "lookup"),
        (MergeSettings, "WISE_REFIT", "no", False),
        (MergeSettings, "WISE_STRENGTH", "2.5", 2.5),
        (MergeSettings, "WISE_POOLING", "mean", "mean"),
        (MergeSettings, "WISE_WEIGHTS", "1,0.5", (1.0, 0.5)),
        (EvalSettings, "WISE_DATASET", "zsre", "zsre"),
        (EvalSettings, "WISE_GENERATE", "no", False),
    ],
)
def test_variables_are_read_as_their_settings_kind(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], variable: str, text: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)
    found = getattr(resolve(kind, {}, section="any"), variable.removeprefix("WISE_").lower())
    assert found == value
    assert type(found) is type(value)


def test_a_file_holds_a_table_a_command_with_dashes_or_underscores(tmp_path: Path) -> None:
    file = written(tmp_path, "[edit]\nmask-ratio = 0.25\nbatch_size = 4\nlayer = 12\n\n[merge]\nweights = [1, 0.5]\n")
    edit = resolve(EditSettings, {}, section="edit", file=file)
    assert (edit.mask_ratio, edit.batch_size, edit.layer) == (0.25, 4, "12")
    assert resolve(MergeSettings, {}, section="merge", file=file).weights == (1.0, 0.5)
    assert resolve(EvalSettings, {}, section="eval", file=file) == EvalSettings()


def test_an_unknown_setting_in_the_file_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "[edit]\npasses = 3\nlearning-speed = 1\n")
    message = refusal(EditSettings, {}, file=file)
    assert str(file) in message
    assert "[edit] has no setting 'learning_speed'" in message
    assert "learning_rate" in message


@pytest.mark.parametrize("text", ["[edit\n", "passes 3", "\x00", "edit = 3\n", '[edit]\npreset = ["paper"]\n'])
def test_a_file_that_is_no_table_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    refusal(EditSettings, {}, file=written(tmp_path, text))


def test_a_file_that_is_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    assert str(missing) in refusal(EditSettings, {}, file=missing)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('[edit]\nlayer = "é"\n'.encode("latin-1"))
    assert str(latin) in refusal(EditSettings, {}, file=latin)


@pytest.mark.parametrize(
    ("kind", "name", "inside", "outside"),
    [
        (EditSettings, "shards", (1, 5), (0, -1)),
        (EditSettings, "edits_per_shard", (1,), (0,)),
        (EditSettings, "mask_ratio", (0.001, 1.0), (0.0, -0.5, 1.0001, float("nan"))),
        (EditSettings, "passes", (1,), (0, -3)),
        (EditSettings, "learning_rate", (1e-5, 10.0), (0.0, -1.0, float("inf"), float("nan"))),
        (EditSettings, "batch_size", (1,), (0,)),
        (EditSettings, "contexts", (0, 3), (-1,)),
        (EditSettings, "context_tokens", (1,), (0,)),
        (EditSettings, "unrelated_texts", (8,), (7,)),
        (EditSettings, "residual_steps", (1, 500), (0, 10**4 + 1)),
        (EditSettings, "residual_more", (0, 500), (-1, 10**4 + 1)),
        (EditSettings, "residual_rate", (0.01, 2.0), (0.0, -1.0, float("nan"))),
        (EditSettings, "residual_stop", (0.01, 1.0), (0.0, 11.0)),
        (EditSettings, "polish", (0, 9), (-1,)),
        (EditSettings, "polish_rate", (1e-4,), (0.0, float("inf"))),
        (MergeSettings, "strength", (0.5, 2.0), (0.0, 11.0)),
        (MergeSettings, "density", (0.001, 1.0), (0.0, 1.5)),
        (MergeSettings, "false_alarm", (0.0, 0.5), (-0.1, 0.6)),
        (EditSettings, "weight_decay", (0.0, 1.0), (-0.1, 1.1)),
        (EvalSettings, "edits", (1,), (0,)),
        (EvalSettings, "max_new_tokens", (1,), (0,)),
    ],
)
def test_bounds_are_kept(kind: type[Any], name: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    for value in inside:
        assert getattr(resolve(kind, {name: value}, section="any"), name) == value
    for value in outside:
        assert f"{name} must lie between" in refusal(kind, {name: value})


@pytest.mark.parametrize(
    ("kind", "name", "choices"),
    [
        (EditSettings, "writer", ("solve", "gradient")),
        (EditSettings, "schedule", ("batched", "sequential")),
        (EditSettings, "mask_kind", ("columns", "elements")),
        (EditSettings, "masks", ("random", "disjoint")),
        (EditSettings, "margin_unit", ("output", "absolute")),
        (EditSettings, "norm_of", ("update", "activated")),
        (EditSettings, "padding", ("left-out", "counted")),
        (EditSettings, "prefixes", ("sampled", "greedy")),
        (EditSettings, "pooling", ("last", "mean")),
        (EditSettings, "threshold", ("false-alarm", "minimum")),
        (MergeSettings, "mode", ("merge", "retrieve", "lookup")),
        (MergeSettings, "pooling", ("last", "mean")),
        (MergeSettings, "norm_of", ("update", "activated")),
        (MergeSettings, "threshold", ("false-alarm", "minimum")),
    ],
)
def test_only_the_listed_choices_are_taken(kind: type[Any], name: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        assert getattr(resolve(kind, {name: choice}, section="any"), name) == choice
    for wrong in ("nonsense", choices[0].upper(), 3):
        message = refusal(kind, {name: wrong})
        assert f"{name} must be one of" in message
        assert all(choice in message for choice in choices)


def test_an_unknown_preset_is_refused_with_those_known() -> None:
    message = refusal(EditSettings, {"preset": "papr"})
    assert "'papr'" in message
    assert all(preset in message for preset in PRESETS)


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ('passes = "many"', "passes"),
        ("passes = []", "passes"),
        ("passes = inf", "passes"),
        ("passes = 2.5", "passes"),
        ("mask-ratio = {}", "mask_ratio"),
        ('alpha = "x"', "alpha"),
        ('train-end = "maybe"', "train_end"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, line: str, flag: str) -> None:
    assert flag in refusal(EditSettings, {}, file=written(tmp_path, f"[edit]\n{line}\n"))


@pytest.mark.parametrize("line", ['weights = "a,b"', 'weights = ["a"]', "weights = 3", "weights = [[1]]"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, f"[merge]\n{line}\n")
    assert "weights must be" in refusal(MergeSettings, {}, section="merge", file=file)


@pytest.mark.parametrize(
    ("variable", "text"), [("WISE_PASSES", "many"), ("WISE_PASSES", "0"), ("WISE_SCHEDULE", "x"), ("WISE_PRESET", "x")]
)
def test_variables_are_checked_like_flags(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(variable, text)
    refusal(EditSettings, {})


def test_a_setting_of_another_version_that_was_not_set_is_passed_over() -> None:
    assert settings_from(MergeSettings, {"no_longer": None, "density": 0.25}) == MergeSettings(density=0.25)
    with pytest.raises(SettingsError, match="no_longer"):
        settings_from(MergeSettings, {"no_longer": 1})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (MergeSettings, "scale", math.nan),
        (MergeSettings, "scale", 1e308),
        (MergeSettings, "weights", "1,nan"),
        (MergeSettings, "weights", (math.inf, 1.0)),
        (MergeSettings, "seed", True),
        (MergeSettings, "seed", 1e308),
        (MergeSettings, "seed", 2**60),
        (MergeSettings, "strength", "inf"),
        (EditSettings, "alpha", "nan"),
        (EditSettings, "norm_constraint", math.inf),
        (EditSettings, "stop_loss", -1),
        (EditSettings, "passes", True),
        (EditSettings, "seed", -1),
    ],
)
def test_no_number_passes_that_is_none_or_beyond_all_bounds(kind: type[Any], name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name} must "):
        resolve(kind, {name: value}, section="merge")


@pytest.mark.parametrize(
    "name", [field.name for kind in (EditSettings, MergeSettings) for field in dataclasses.fields(kind)]
)
def test_every_number_has_bounds(name: str) -> None:
    kind = EditSettings if name in EditSettings.__dataclass_fields__ else MergeSettings
    default = getattr(kind(), name)
    if isinstance(default, int | float) and not isinstance(default, bool):
        for value in (math.nan, math.inf, -math.inf, 1e300):
            with pytest.raises(SettingsError):
                resolve(kind, {name: value}, section="merge")
