import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reference.wise import whitened_keys
from safetensors.torch import load_file
from support.helpers import save_tiny
from support.history import FLAGS, batch_from, held
from support.loading import CPU

from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.edit_into import IntoMemory, IntoReport, edit_into
from wisecli.commands.edit.watch import follow
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.diff import diff
from wisecli.commands.memory.log import log
from wisecli.commands.memory.merge_into import merge_into
from wisecli.commands.memory.remove import remove
from wisecli.config import EditSettings, EvalSettings, MergeSettings
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import read_history

ONE: dict[str, Any] = {
    "id": "one",
    "prompt": "ba be bi",
    "target": "do du",
    "also": [{"prompt": "ka ke ki", "target": "do du"}, {"prompt": "do du", "target": "ba"}],
}
TWO: dict[str, Any] = {"id": "two", "prompt": "ma me", "target": "ga ge"}
QUICK: dict[str, Any] = {**FLAGS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("consequences") / "model")


@pytest.fixture(scope="module")
def memory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of two edits, one with two consequences; nothing in it may change."""
    place = tmp_path_factory.mktemp("held") / "memory"
    into(model, place, [ONE, TWO])
    return place


def written(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def into(model: Path, memory: Path, records: Sequence[dict[str, Any]]) -> IntoReport:
    batch = batch_from(written(memory.parent / "edits.jsonl", records))
    return edit_into(IntoMemory(str(model), memory, QUICK, load=CPU), batch)


def test_consequences_are_written_and_routed_like_edits(memory: Path) -> None:
    manifest = read_manifest(memory)
    assert [edit.id for edit in manifest.edits] == ["one", "one/also-1", "one/also-2", "two"]
    assert [edit.consequence_of for edit in manifest.edits] == [None, "one", "one", None]
    assert manifest.memories[0].edits == ("one", "one/also-1", "one/also-2", "two")
    report = inspect(memory)
    assert (report.total, report.consequences) == (4, 2)
    listed = report.as_json()["results"]["edits"]
    assert (listed["count"], listed["consequences"], report.as_json()["n-samples"]) == (2, 2, {"edits": 2})


def test_the_log_knows_them_from_edits(memory: Path) -> None:
    report = log(memory)
    assert report.consequences == {"one/also-1", "one/also-2"}
    assert [edit.consequence_of for edit, _ in report.edits] == [None, "one", "one", None]


def test_an_evaluation_counts_them_apart(memory: Path) -> None:
    figures = evaluate(memory, EvalSettings(generate=False), load=CPU)
    assert (figures.samples["edits"], figures.samples["reliability"], figures.samples["consequences"]) == (2, 2, 2)
    assert "consequences" in figures.before
    first = evaluate(memory, EvalSettings(generate=False, edits=1), load=CPU)
    assert (first.samples["reliability"], first.samples["consequences"]) == (1, 2)
    data = written(memory.parent / "asked.jsonl", [TWO])
    assert "consequences" not in evaluate(memory, EvalSettings(generate=False), data=data, load=CPU).after
    data = written(memory.parent / "asked.jsonl", [{name: ONE[name] for name in ("id", "prompt", "target")}])
    assert evaluate(memory, EvalSettings(generate=False), data=data, load=CPU).samples["consequences"] == 2


def test_an_export_carries_them(memory: Path, tmp_path: Path) -> None:
    report = export(memory, tmp_path / "edited", load=CPU)
    assert (report.edits, report.consequences) == (2, 2)
    assert read_manifest(tmp_path / "edited").edits == read_manifest(memory).edits
    assert diff(str(memory), str(tmp_path / "edited")).added == ()
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "2 edits with 2 consequences" in card
    assert card.count("(a consequence)") == 2


def test_without_its_edit_a_consequence_goes_and_alone_it_may(model: Path, memory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "memory"
    into(model, copy, [ONE, TWO])
    report = remove(copy, ["one/also-1"])
    assert (held(copy), report.consequences, report.release.removed) == (
        ["one", "one/also-2", "two"],
        (),
        ("one/also-1",),
    )
    report = remove(copy, ["one"])
    assert (held(copy), report.consequences) == (["two"], ("one/also-2",))
    assert report.release.removed == ("one", "one/also-2")
    # What is left is what would be there without them.
    (tmp_path / "alone").mkdir()
    into(model, tmp_path / "alone" / "memory", [TWO])
    mine, theirs = (load_file(path / "memory.safetensors") for path in (copy, tmp_path / "alone" / "memory"))
    assert mine["whitened_keys"].shape == theirs["whitened_keys"].shape
    assert float((whitened_keys(mine) - whitened_keys(theirs)).norm()) < 1e-2


def test_another_target_drops_what_followed_from_the_former(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    into(model, memory, [ONE, TWO])
    report = into(model, memory, [{**ONE, "target": "fa fe", "also": [{"prompt": "ka ke ki", "target": "fa fe"}]}])
    assert held(memory) == ["two", "one", "one/also-1"]
    assert report.release is not None
    assert (report.release.modified, report.release.superseded) == (("one", "one/also-1"), {"one/also-2": "one"})
    # By its prompt under another id, too.
    report = into(model, memory, [{"id": "new", "prompt": ONE["prompt"], "target": "ta"}])
    assert report.release is not None
    assert report.release.superseded == {"one": "new", "one/also-1": "new"}
    assert held(memory) == ["two", "new"]


def test_shards_that_are_taken_in_give_way_to_edits_that_are_held(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    into(model, memory, [{"id": "own", "prompt": "ka ke ki", "target": "fu"}, {**TWO, "also": [ONE["also"][1]]}])
    settings = EditSettings(**QUICK)
    run_edit(str(model), written(tmp_path / "more.jsonl", [ONE]), tmp_path / "shards", settings, load=CPU)
    merge_into([tmp_path / "shards"], memory, MergeSettings())
    assert held(memory) == ["own", "two", "one", "one/also-2"]
    newest = read_history(memory)[-1]
    assert (newest.added, newest.superseded) == (("one", "one/also-2"), {"two/also-1": "one/also-2"})
    assert [one.id for one in OpenMemory(memory).edits(newest)] == held(memory)


def test_lines_that_are_watched_bring_their_consequences(model: Path, tmp_path: Path) -> None:
    path, memory = written(tmp_path / "growing.jsonl", [ONE]), tmp_path / "memory"
    looks = iter([True, False])
    into_memory = IntoMemory(str(model), memory, QUICK, load=CPU)
    landed = list(follow(into_memory, path, goes_on=lambda: next(looks), interval=0.01))
    assert [report.held for report in landed] == [3]
    looks = iter([True, False])
    assert list(follow(into_memory, path, goes_on=lambda: next(looks), interval=0.01)) == []


def test_commands_count_and_show_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Any
) -> None:
    edits, shards, memory = written(tmp_path / "e.jsonl", [ONE, TWO]), tmp_path / "shards", tmp_path / "memory"

    def said(*line: object) -> str:
        capsys.readouterr()
        assert run(*map(str, line)) == 0
        return capsys.readouterr().out

    shown = "consequence: one/also-1: ka ke ki → do du (follows from one)"
    planned = said("edit", model, edits, "-o", shards, "--dry-run")
    assert "2 edits with 2 consequences" in planned
    assert shown in planned
    done = said("edit", model, edits, "-o", shards)
    assert done.startswith("2 edits with 2 consequences in 1 shard")
    assert shown in done
    assert "up to date" in said("edit", model, edits, "-o", shards)
    assert "2 edits with 2 consequences by lookup" in said("merge", shards, "-o", memory)
    assert "2 and 2 consequences" in said("inspect", memory)
    assert "2 edits with 2 consequences held" in said("log", memory)
    assert "1 edit with 2 consequences out" in (gone := said("remove", memory, "one"))
    assert "out as a consequence: one/also-2" in gone
    assert "2 in, 2 out" not in (told := said("log", memory))
    assert "2 in" in told
    assert "2 out" in told


def test_what_is_derived_is_shown_first_and_kept_apart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Any
) -> None:
    record = {"id": "one", "prompt": "Who is the mother of Ba?", "target": "Do", "subject": "Ba"}
    edits, memory = written(tmp_path / "e.jsonl", [record]), tmp_path / "memory"
    line = ("edit", str(model), str(edits), "--derive", "--json")
    assert run(*line, "-o", str(tmp_path / "shards"), "--dry-run") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["edits"] == 1
    (shown,) = results["consequences"]
    told = shown["id"], shown["consequence_of"], shown["derived"], shown["prompt"], shown["target"]
    assert told == ("one/reverse-1", "one", "reverse of parent", "Who is the child of Do?", "Ba")
    assert run(*line, "--into", str(memory)) == 0
    capsys.readouterr()
    assert [edit.derived for edit in read_manifest(memory).edits] == [None, "reverse of parent"]
    # The same again has nothing to do.
    assert run(*line, "--into", str(memory)) == 0
    assert json.loads(capsys.readouterr().out)["results"]["known"] == ["one"]
    assert len(read_history(memory)) == 1
