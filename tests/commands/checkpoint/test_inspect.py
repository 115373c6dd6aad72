import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.places import EDITS, PLACES, change, copied, make_places
from typer.testing import CliRunner

from wisecli.cli.app import program
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.errors import DamagedFileError, ModelError, OutputExistsError, SettingsError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_places(tmp_path_factory.mktemp("inspect"))


def manifest(directory: Path) -> dict[str, Any]:
    name = "shards.json" if directory.name == "shards" else "router.json"
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


def printed(*arguments: str) -> str:
    outcome = CliRunner().invoke(program(), list(arguments))
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize("place", PLACES)
def test_a_report_says_what_the_manifest_and_the_files_say(root: Path, place: str) -> None:
    report, written = inspect(root / place), manifest(root / place)
    assert report.kind == {"shards": "shards", "edited": "exported"}.get(place, "memory")
    assert report.base == written["base"]
    assert report.site == written["site"]
    assert report.settings == written["settings" if place == "shards" else "merge"]
    assert report.versions == written["versions"]
    assert [edit.id for edit in report.edits] == ["one", "two", "three"]
    assert report.files == {path.name: path.stat().st_size for path in (root / place).iterdir() if path.is_file()}
    assert [entry.threshold for entry in report.memories] == [m["threshold"] for m in written.get("memories", [])]
    assert [entry.file for entry in report.shards] == [shard["file"] for shard in written.get("shards", [])]


@pytest.mark.parametrize("place", PLACES)
def test_tensors_and_keys_are_those_of_the_files(root: Path, place: str) -> None:
    report, keys = inspect(root / place), 0
    for file, listed in report.tensors.items():
        tensors = load_file(root / place / file)
        shapes = {name: "×".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
        types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        assert listed == {name: f"{types[name]} {shapes[name]}" for name in tensors}
        keys += sum(
            len(tensor) for name, tensor in tensors.items() if name.endswith(("whitened_keys", "evidence.keys"))
        )
    assert report.tensors
    assert report.keys == keys


@pytest.mark.parametrize(
    ("find", "found"),
    [("BEBI", ["one"]), ("ka ke", ["two"]), ("GA GE", ["three"]), ("two", ["two"]), ("e", ["one", "two", "three"])],
)
def test_edits_are_found_by_prompt_target_subject_and_id(root: Path, find: str, found: list[str]) -> None:
    report = inspect(root / "memory", find=find)
    assert [edit.id for edit in report.edits] == found
    assert (report.matched, report.total) == (len(found), len(EDITS))
    limited = inspect(root / "memory", find=find, limit=1)
    assert [edit.id for edit in limited.edits] == found[:1]
    assert limited.matched == len(found)


def test_that_no_edit_is_found_is_said(root: Path) -> None:
    assert f"none of {len(EDITS)} edits has that text in it" in printed("inspect", str(root / "memory"), "--find", "zz")


@pytest.mark.parametrize("place", PLACES)
def test_json_is_one_object_with_the_keys_of_every_report(root: Path, place: str) -> None:
    content = json.loads(printed("inspect", str(root / place), "--json", "--find", "bebi"))
    assert {"results", "config", "versions", "n-samples"} <= content.keys()
    assert content["n-samples"] == {"edits": 3}
    results = content["results"]
    assert {"path", "kind", "base", "site", "edits", "memories", "shards", "files", "tensors", "keys"} <= results.keys()
    assert results["edits"]["count"] == 3
    assert [edit["prompt"] for edit in results["edits"]["listed"]] == ["ba be bi"]
    for entry in results["memories"]:
        assert entry["edit_scores"].keys() == entry["unrelated_scores"].keys() >= {"0", "0.5", "1"}


def test_people_read_the_same_facts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = printed("inspect", str(root / "memory"), "--limit", "2")
    written = manifest(root / "memory")
    says = (
        written["base"]["model"],
        written["site"]["layer_module"],
        "3, with",
        "2 of 3 edits",
        "ka ke ki ko",
        "seed 0",
    )
    for fact in (*says, f"{written['memories'][0]['threshold']:.4g}", "memory.safetensors", "wisecli"):
        assert fact in text, fact
    assert "ma me" not in text


def test_what_would_steer_a_terminal_is_spelt_out(root: Path, tmp_path: Path) -> None:
    place = copied(root, "memory", tmp_path)
    change(place / "router.json", lambda content: content["edits"][0].update(prompt="\x1b]0;owned\x07[red]b[/red]"))
    text = printed("inspect", str(place))
    assert "\x1b" not in text
    assert "\\x1b]0;owned" in text
    assert "[red]" in text


def test_no_weights_are_read_and_no_model_library_is_imported(root: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom wisecli import cli\nfrom wisecli.io import checkpoint\n"
        "def read(*_): raise SystemExit('weights were read')\n"
        "checkpoint.open_tensors = checkpoint.load_tensors = checkpoint.sha256_file = read\n"
        "from pathlib import Path\nfrom wisecli.commands.checkpoint.inspect import inspect\n"
        f"for place in {[str(root / place) for place in PLACES]!r}:\n    inspect(Path(place))\n"
        "sys.exit(3 if 'transformers' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_none_of_the_three_is_refused(root: Path, tmp_path: Path) -> None:
    neither = r"holds neither shards\.json nor router\.json"
    for path, says in (
        (root / "model", neither),
        (tmp_path, neither),
        (root / "edits.jsonl", "is a file"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(ModelError, match=says):
            inspect(path)
    with pytest.raises((ModelError, DamagedFileError)):
        inspect(tmp_path / ("x" * 5000))


# --- the picture ---


@pytest.mark.parametrize(("place", "kind"), [("memory", "png"), ("retrieve", "svg"), ("edited", "svg")])
def test_a_picture_is_drawn(root: Path, tmp_path: Path, place: str, kind: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"router.{kind}"
    assert inspect(root / place, plot=path).plot == path
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[kind]
    assert path.read_bytes().startswith(begins)
    with pytest.raises(OutputExistsError):
        inspect(root / place, plot=path)
    inspect(root / place, plot=path, force=True)


def test_the_picture_has_labelled_axes_and_each_memorys_threshold(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    kept: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    report = inspect(root / "retrieve", plot=tmp_path / "router.png")
    (figure,) = kept
    assert len(figure.axes) == len(report.memories) == 2
    for panel, entry in zip(figure.axes, report.memories, strict=True):
        assert "score" in panel.get_xlabel()
        assert "share" in panel.get_ylabel()
        unrelated, edits, threshold = panel.get_lines()
        assert list(threshold.get_xdata()) == [entry.threshold] * 2
        for line, scores in ((unrelated, entry.unrelated_scores), (edits, entry.edit_scores)):
            drawn = dict(zip(line.get_ydata(), line.get_xdata(), strict=True))
            assert drawn == {float(share): score for share, score in scores.items()}
        assert len(panel.get_legend().get_texts()) == 3


def test_a_picture_that_cannot_be_drawn_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="merge the shards"):
        inspect(root / "shards", plot=tmp_path / "router.png")
    if importlib.util.find_spec("matplotlib") is not None:
        with pytest.raises(SettingsError, match="no such kind of picture"):
            inspect(root / "memory", plot=tmp_path / "router.doc")
        with pytest.raises(SettingsError, match="cannot be written"):
            inspect(root / "memory", plot=tmp_path / "nowhere" / "router.png")
    monkeypatch.setattr("wisecli.commands.checkpoint.plot.find_spec", lambda _name: None)
    with pytest.raises(SettingsError, match=r"install it with pip install 'wisecli\[plot\]'"):
        inspect(root / "memory", plot=tmp_path / "router.png")
    assert list(tmp_path.iterdir()) == []


def test_torch_is_not_made_to_allocate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("something was allocated"))
    inspect(root / "memory")
