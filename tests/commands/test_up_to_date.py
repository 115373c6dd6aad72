"""The same command again finds its work done; another one is refused, and says what differs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from support.ready import EDITS, Ready, here, require_refusal, rewrite, write_edits
from support.tiny_models import Wise

from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint import export as exporting
from wisecli.commands.checkpoint import export_merged, export_stock
from wisecli.editing.run import base_model, worker

EXPORTS = ("routed", "merged", "delta")


def state(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Every file and directory: where it lies on the disk, when it was changed, and what is in it."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (status.st_ino, status.st_mtime_ns, status.st_size, content)
    return found


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base_model, export_stock, export_merged):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


def require_kept(wise: Wise, place: Path, line: str, says: str) -> None:
    """A line that asks for something else is refused, and says what differs; nothing that is there changes."""
    before = state(place)
    require_refusal(wise(*line.split()), "already exists", says, "--force")
    assert state(place) == before


def require_idle(wise: Wise, output: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line again changes nothing and says so; with --force it makes everything anew."""
    before, around = state(output), here()
    with monkeypatch.context() as patched:
        forbid_loading(patched)
        outcome = wise(*line.split())
        assert (outcome.code, "up to date" in outcome.out) == (0, True), outcome.err
        told = wise(*line.split(), "--json")
        assert (told.code, json.loads(told.out)["results"]["up_to_date"]) == (0, True)
    assert state(output) == before
    assert here() == around
    assert wise(*line.split(), "--force").code == 0
    after = state(output)
    assert after.keys() == before.keys()
    assert all(after[name][0] != before[name][0] for name in before if name.endswith((".json", "shards", "memory")))
    assert here() == around


@pytest.mark.parametrize("only", ["", " --only 2/2"])
def test_edits_that_are_written_are_not_written_again(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    line = f"edit {ready.model} {ready.edits} --shards 2"
    assert wise(*line.split()).code == 0
    if only:
        assert "up to date" in wise(*line.split(), *only.split()).out
        return
    require_idle(wise, Path("shards"), line, monkeypatch)
    for other, says in (
        (f"{line} --seed 3", "seed was 0, now 3"),
        (f"{line} --layer 1", "the site was"),
        (f"edit {ready.other_model} {ready.edits} --shards 2", "has changed"),
        (f"edit {ready.model} {ready.other_edits}", "of the edits 4 are gone, the first of them 'one'"),
    ):
        require_kept(wise, Path("shards"), other, says)


def test_a_model_that_was_trained_on_elsewhere_is_another(wise: Wise, ready: Ready, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    assert wise("edit", str(model), ready.edits).code == 0
    assert "up to date" in wise("edit", str(model), ready.edits).out
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, model / "model.safetensors")
    require_refusal(wise("edit", str(model), ready.edits), "weights of the model", "have changed")


def test_what_the_model_knew_is_remembered(
    wise: Wise, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = write_edits(tmp_path / "edits", EDITS)
    monkeypatch.setattr(worker, "known_rows", lambda *_, **__: {1, 2})
    line = ("edit", ready.model, str(edits), "--skip-known")
    assert wise(*line).code == 0
    shards = read_shard_directory(Path("shards"))
    assert [edit.id for edit in shards.edits] == ["one", "four"]
    with monkeypatch.context() as patched:
        forbid_loading(patched)
        assert "up to date" in wise(*line).out
        write_edits(edits, EDITS[1:])
        require_refusal(wise(*line), "1 are gone, the first of them 'one'")
        write_edits(edits, [*EDITS, {"id": "five", "prompt": "na ne", "target": "ni"}])
        require_refusal(wise(*line), "1 are new, the first of them 'five'")
        write_edits(edits, EDITS)
        require_refusal(wise(*line[:-1]), "2 are new, the first of them 'two'")


def test_strict_is_not_content_with_what_did_not_take_then(wise: Wise, ready: Ready) -> None:
    line = f"edit {ready.model} {ready.edits} --writer gradient --passes 10"
    assert wise(*line.split()).code == 0
    assert wise(*line.split()).code == 0
    require_refusal(wise(*line.split(), "--strict"), "did not take", code=1)


def test_a_memory_that_is_merged_is_not_merged_again(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = f"merge {ready.shards_at_matrix}"
    assert wise(*line.split()).code == 0
    require_idle(wise, Path("memory"), line, monkeypatch)
    shutil.copytree(ready.shards_at_matrix, tmp_path / "moved")
    assert "up to date" in wise("merge", str(tmp_path / "moved")).out
    shutil.copytree(ready.shards_at_matrix, tmp_path / "changed")
    listed = json.loads((tmp_path / "changed" / "shards.json").read_text())
    rewrite(tmp_path / "changed" / "shards.json", subjects={}, contexts=[*listed["contexts"], "x"])
    for other, says in (
        (f"{line} --false-alarm .3", "false_alarm was"),
        (f"{line} --mode merge", "mode was lookup, now merge"),
        (f"merge {ready.gradient_shards} --mode lookup", "the shards are others"),
        (f"merge {tmp_path}/changed", "the shards are others"),
        (f"merge {ready.shards} -o {ready.tampered_memory}", "memory.safetensors is not as it was written"),
    ):
        require_kept(wise, Path("memory"), other, says)


@pytest.mark.parametrize("form", EXPORTS)
def test_an_export_that_is_there_is_not_made_again(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    memory = ready.merge if form == "merged" else ready.memory
    line = f"export --memory {memory} --format {form}"
    assert wise(*line.split()).code == 0
    require_idle(wise, Path("edited"), line, monkeypatch)
    other = {"routed": "delta", "merged": "routed", "delta": "routed"}[form]
    figures = {"results": {"zsre": {"reliability": 0.5}}, "date": "today"}
    Path("figures.json").write_text(json.dumps(figures))
    for changed, says in (
        (f"export --memory {memory} --format {other}", f"format was {form}, now {other}"),
        (f"export --memory {ready.retrieve} --format routed", "the memory is another"),
        (f"{line} --dtype bfloat16", "dtype was auto, now bfloat16"),
        (f"{line} --no-model-card", "model_card was True, now False"),
        (f"{line} --metrics figures.json", "the figures of --metrics are others"),
    ):
        require_kept(wise, Path("edited"), changed, says)
    # Figures count, and not when they were taken.
    assert wise(*line.split(), "--metrics", "figures.json", "--force").code == 0
    Path("figures.json").write_text(json.dumps({**figures, "date": "tomorrow"}))
    assert "up to date" in wise(*line.split(), "--metrics", "figures.json").out
    with (Path("edited") / "README.md").open("a") as card:
        card.write(" ")
    require_refusal(wise(*line.split(), "--metrics", "figures.json"), "README.md is not as it was written")


def test_an_export_of_a_base_that_changed_is_another(wise: Wise, ready: Ready, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ready.model, tmp_path / "model"))
    line = ("export", str(model), "--memory", ready.memory)
    assert wise(*line).code == 0
    (model / "NOTICE.txt").write_text("a new file")
    require_refusal(wise(*line), "files of the base model have changed")


def test_what_is_sent_to_the_hub_is_sent_again(wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def push(output: Path, publication: exporting.Publication, _: object) -> str | None:
        sent.append((output.name, publication.push_to))
        return publication.push_to

    monkeypatch.setattr(exporting, "_push", push)
    assert wise("export", "--memory", ready.memory).code == 0
    assert "sent to me/model" in wise("export", "--memory", ready.memory, "--push-to-hub", "me/model").out
    assert sent == [("edited", None), ("edited", "me/model")]


def grown(wise: Wise, ready: Ready, *edits: dict[str, Any]) -> tuple[str, ...]:
    """The chain of a first day, and edits of the second; the first day's merge."""
    chain = (("edit", ready.model, ready.edits), ("merge", "shards"))
    for line in chain:
        assert wise(*line).code == 0
    write_edits(Path("second"), list(edits))
    assert wise("edit", ready.model, "second", "--into", "memory").code == 0
    assert "up to date" in wise(*chain[0]).out
    return chain[1]


def test_the_chain_of_the_first_day_runs_again_on_a_memory_that_has_grown(wise: Wise, ready: Ready) -> None:
    """Scheduled jobs: `edit` and `merge` are run again every day, beside `edit --into` of what is new."""
    line = grown(wise, ready, {"id": "five", "prompt": "na ne", "target": "ni"})
    before = state(Path("memory"))
    outcome = wise(*line)
    assert (outcome.code, "up to date" in outcome.out) == (0, True), outcome.err
    assert "it was changed since, and holds 5 edits now" in outcome.out
    told = json.loads(wise(*line, "--json").out)["results"]
    assert (told["up_to_date"], told["held"], told["gone"]) == (True, 5, [])
    assert wise(*line, "--dry-run").code == 0
    assert state(Path("memory")) == before
    require_refusal(wise(*line, "--force"), "has a history")
    require_refusal(wise(*line, "--no-history"), "has a history")
    require_kept(wise, Path("memory"), "merge shards --false-alarm .3", "false_alarm was")
    require_refusal(wise("merge", ready.shards_of_other_model), "has a history")


def test_what_came_since_stays_as_it_is(wise: Wise, ready: Ready) -> None:
    """Scheduled jobs: what was replaced or removed since must not come back by yesterday's commands."""
    line = grown(wise, ready, {**EDITS[0], "id": "new", "target": "fa"})
    assert wise("remove", "memory", "three").code == 0
    before = state(Path("memory"))
    outcome = wise(*line)
    assert (outcome.code, "up to date" in outcome.out) == (0, True), outcome.err
    assert "no longer in it, as it was replaced or removed: one" in outcome.out
    assert json.loads(wise(*line, "--json").out)["results"]["gone"] == ["one", "three"]
    assert state(Path("memory")) == before


def test_a_damaged_memory_that_has_grown_is_not_up_to_date(wise: Wise, ready: Ready) -> None:
    line = grown(wise, ready, {"id": "five", "prompt": "na ne", "target": "ni"})
    with (Path("memory") / "memory.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    require_refusal(wise(*line), "its sha256 differs")


def test_a_memory_that_no_longer_has_the_shards_is_another(wise: Wise, ready: Ready) -> None:
    """Scheduled jobs: a memory was rolled back to where other shards had come first."""
    assert wise("edit", ready.model, ready.other_edits, "--into", "memory").code == 0
    assert wise("merge", ready.shards, "--into", "memory").code == 0
    assert "up to date" in wise("merge", ready.shards, "-o", "memory").out
    assert wise("rollback", "memory", "--to", "1").code == 0
    require_refusal(wise("merge", ready.shards, "-o", "memory"), "has a history")
