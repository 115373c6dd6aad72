"""``wise settings``, and ``--set`` and the options that went in a real command line."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from tests.support.tiny_models import Wise
from wisecli.cli.setting_options import settings_in
from wisecli.cli.setting_table import KINDS, TEXTS
from wisecli.config import EditRunSettings, EditSettings, resolve
from wisecli.errors import SettingsError


def test_every_setting_is_listed_with_its_meaning(wise: Wise) -> None:
    for command, kinds in KINDS.items():
        names = [field.name for kind in kinds for field in fields(kind)]
        told = json.loads(wise("settings", command, "--json").out)["results"]
        assert [row["name"] for row in told[command]] == names
        assert all(row["meaning"] and row["values"] for row in told[command])
    for kind, texts in TEXTS.items():
        assert set(texts) == {field.name for field in fields(kind)}


def test_an_unknown_command_has_no_settings(wise: Wise) -> None:
    done = wise("settings", "export")
    assert done.code == 2
    assert "name one of edit, merge, eval, bench" in done.err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("mask_ratio=.25", 0.25),
        ("mask-ratio=.25", 0.25),
        ("in_forms=no", False),
        ("shards=3", 3),
        ("target_module=model.layers.{layer}", "model.layers.{layer}"),
    ],
)
def test_a_text_is_read_as_its_setting(text: str, value: object) -> None:
    assert list(settings_in("edit", [text]).values()) == [value]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_rato=1", "did you mean mask_ratio?"),
        ("density=1", "`wise edit` has no such setting"),
        ("passes", "give a value, as in --set passes=VALUE"),
        ("passes=many", "passes must be a whole number, not 'many'"),
        ("mask_ratio=2", "mask_ratio must lie between"),
    ],
)
def test_what_is_no_setting_is_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")):
        settings_in("edit", [text])
    assert EditSettings().passes == 60


def test_a_setting_that_does_nothing_is_named(wise: Wise, tmp_path: Path) -> None:
    done = wise("merge", str(tmp_path), "--dry-run", "--mode", "merge", "--set", "strength=2")
    assert "warning: --set strength=2.0 has no effect with --mode merge" in done.err


def test_settings_of_a_run_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "wise.toml"
    file.write_text('[edit]\nonly = "2/3"\npasses = 7\n', encoding="utf-8")
    assert resolve(EditRunSettings, {}, section="edit", file=file).only == "2/3"
    assert resolve(EditSettings, {}, section="edit", file=file).passes == 7
