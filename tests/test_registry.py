"""Tables by name, and what other packages add to them: a package is written and found as an installed one is."""

from pathlib import Path

import pytest
import torch

from tests.support.ready import Ready
from tests.support.tiny_models import Wise
from wisecli.errors import SettingsError
from wisecli.memory.merging import merge_methods
from wisecli.memory.merging.merge_methods import Method
from wisecli.registry import Registry


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two merge methods, one of which adds itself, with a third that cannot be loaded in a group apart."""
    site = tmp_path / "site"
    (site / "halves-1.0.dist-info").mkdir(parents=True)
    (site / "halves-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (site / "halves-1.0.dist-info" / "entry_points.txt").write_text(
        "[wisecli.merges]\nhalf = halves:half\n"
        "[tests.broken]\nnone = halves:nothing\n"
        "[tests.twice]\nhalf = halves:half\n"
    )
    (site / "halves.py").write_text("def half(deltas, recipe):\n    return deltas.sum(0) / 2\n")
    monkeypatch.syspath_prepend(site)
    return site


def test_a_name_is_taken_once() -> None:
    table: Registry[int] = Registry("tests.none")
    assert table.register("one")(1) == 1
    table.add("one", 1)  # a module that is imported twice
    with pytest.raises(SettingsError, match=r"'one' is in tests\.none twice"):
        table.add("one", 2)
    assert dict(table) == {"one": 1}
    table.load_installed()
    assert len(table) == 1


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_loaded_names_its_package() -> None:
    with pytest.raises(SettingsError, match=r"'none' of the package halves cannot be loaded .*uninstall"):
        Registry[object]("tests.broken").load_installed()


@pytest.mark.usefixtures("installed")
def test_a_name_of_ours_is_not_taken_over() -> None:
    table: Registry[object] = Registry("tests.twice")
    table.add("half", object())
    with pytest.raises(SettingsError, match="twice"):
        table.load_installed()


@pytest.mark.usefixtures("installed")
def test_a_merge_method_of_another_package_merges(wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    own: Registry[Method] = Registry("wisecli.merges")
    for name, item in merge_methods.METHODS.items():
        own.add(name, item)
    for place in ("wisecli.memory.merging.merge_methods", "wisecli.memory.merging.merger"):
        monkeypatch.setattr(f"{place}.METHODS", own)
    assert wise("edit", ready.model, ready.edits, "--set", "in_forms=false", "--set", "shards=2").code == 0
    assert wise("merge", "shards", "--method", "half", "--set", "refit=false").code == 0
    assert "half" in own
    refused = wise("merge", "shards", "--method", "third", "-o", "other")
    assert refused.code == 2
    assert "half" in refused.err
    deltas = torch.ones(2, 2, 3)
    assert torch.equal(own["half"](deltas, None), torch.ones(2, 3))  # type: ignore[arg-type]  # reads no recipe
