import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from reference.wise import whitened_keys
from safetensors.torch import load_file
from support.helpers import save_tiny
from support.history import FLAGS, batch_from, fact, held, write
from support.loading import CPU
from torch import Tensor
from transformers import AutoModelForCausalLM

from wisecli.artifacts.memory_manifest import MANIFEST_NAME, read_manifest, read_memory
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.edit_into import IntoMemory, IntoReport, edit_into
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.edit.watch import follow as run_follow
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.diff import diff
from wisecli.commands.memory.log import log
from wisecli.commands.memory.merge import merge
from wisecli.commands.memory.merge_into import merge_into
from wisecli.commands.memory.remove import remove
from wisecli.commands.memory.rollback import rollback
from wisecli.config import EditSettings, EvalSettings, MergeSettings, SiteName
from wisecli.edits.record import Edit
from wisecli.errors import (
    BusyError,
    ChangedInputError,
    DamagedFileError,
    MemoryHistoryError,
    ProtectedOutputError,
    SettingsError,
)
from wisecli.io.user_cache import cache_path
from wisecli.memory.history.release_log import HISTORY, LOG, Provenance, read_history
from wisecli.memory.history.superseded_edits import superseding
from wisecli.memory.merging.removal import load_without, solved_anew, without
from wisecli.progress import Event, ProgressCallback, ignore_progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("history") / "model")


@pytest.fixture(scope="module")
def first_release(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of facts 0 and 1."""
    memory = tmp_path_factory.mktemp("release") / "memory"
    into(model, memory, [fact(0), fact(1)])
    return memory


@pytest.fixture
def memory(first_release: Path, tmp_path: Path) -> Path:
    """A copy of it, which may be changed."""
    return Path(shutil.copytree(first_release, tmp_path / "memory"))


def into(
    model: Path,
    memory: Path,
    edits: Sequence[Edit],
    *,
    flags: Mapping[str, Any] = MappingProxyType({}),
    provenance: Provenance = Provenance(),
    on_progress: ProgressCallback = ignore_progress,
) -> IntoReport:
    batch = batch_from(write(memory.parent / "edits.jsonl", edits))
    given = {**FLAGS, **flags}
    into_memory = IntoMemory(str(model), memory, given, provenance=provenance, load=CPU)
    return edit_into(into_memory, batch, on_progress=on_progress)


def at_once(model: Path, place: Path, edits: Sequence[Edit], *, site: SiteName = "auto", **merging: Any) -> Path:
    """A memory of edits that were never more or fewer."""
    shards, memory = place / "whole-shards", place / "whole"
    settings = EditSettings(**FLAGS, site=site)
    run_edit(
        str(model), write(place / "whole.jsonl", edits), shards, settings, load=CPU, options=RunOptions(force=True)
    )
    merge([shards], memory, MergeSettings(**merging), force=True)
    return memory


def tensors(memory: Path) -> dict[str, Tensor]:
    return load_file(memory / "memory.safetensors")


def keys_and_values(memory: Path) -> Tensor:
    """Probes of a lookup with what each adds (n, d_ff + d)."""
    found = tensors(memory)
    return torch.cat([whitened_keys(found), found["residuals"].float()[found["key_to_residual"]]], 1)


def require_same_lookup(memory: Path, other: Path) -> None:
    mine, theirs = keys_and_values(memory), keys_and_values(other)
    assert mine.shape == theirs.shape
    distance = torch.cdist(mine, theirs).amin(1)
    assert float(distance.max() / theirs.norm(dim=1).mean()) < 2e-3  # they are kept in half precision
    assert float(torch.cdist(theirs, mine).amin(1).max() / theirs.norm(dim=1).mean()) < 2e-3
    mine, theirs = read_memory(memory).memory.thresholds[0], read_memory(other).memory.thresholds[0]
    assert mine == pytest.approx(theirs, rel=1e-3)


def test_later_edits_take_over_what_the_router_learned_of_the_model(
    model: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # as on another machine
    into(model, memory, [fact(2)])
    assert not cache_path("meaning").exists()
    first, last = (
        read_shard_directory(path).load_unrelated() for path in sorted((memory / HISTORY / "shards").iterdir())
    )
    assert first.heads is not None and last.heads is not None
    torch.testing.assert_close(dict(last.heads.tensors()), dict(first.heads.tensors()), rtol=0, atol=0)
    assert held(memory) == ["e0", "e1", "e2"]


def test_rounds_come_to_what_one_round_would(model: Path, tmp_path: Path) -> None:
    edits = [fact(number) for number in range(12)]
    for number in range(3):
        report = into(model, tmp_path / "memory", edits[4 * number : 4 * number + 4])
        assert (report.release.number, report.held) == (number + 1, 4 * number + 4)
    require_same_lookup(tmp_path / "memory", at_once(model, tmp_path, edits))
    assert held(tmp_path / "memory") == [edit.id for edit in edits]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    files = (tmp_path / "memory").rglob("unrelated.safetensors")
    assert len({path.stat().st_ino for path in files}) == 1


def test_what_is_removed_is_as_if_it_had_never_been_there(tmp_path: Path) -> None:
    # Sums of edits in other company round otherwise, and where a residual is certain early, it is so a step sooner.
    model = save_tiny(tmp_path / "model", loudness=1)
    edits, memory = [fact(number) for number in range(7)], tmp_path / "memory"
    into(model, memory, edits)
    report = remove(memory, ["e1", "e6"])
    assert report.rewritten == ()
    left = [edit for edit in edits if edit.id not in ("e1", "e6")]
    assert held(memory) == [edit.id for edit in left]
    require_same_lookup(memory, at_once(model, tmp_path, left))


@pytest.mark.parametrize("mode", ["lookup", "merge"])
def test_a_memory_outlives_every_edit_that_was_read_in_the_context_held_back(
    model: Path, tmp_path: Path, mode: str
) -> None:
    edits, memory = [fact(number) for number in range(33)], tmp_path / "memory"
    into(model, memory, edits, flags={"edits_per_shard": 100, "site": "matrix"})
    merge_into([], memory, MergeSettings(mode=mode))  # type: ignore[arg-type]
    remove(memory, [edit.id for edit in edits[::2]])
    assert held(memory) == [edit.id for edit in edits[1::2]]
    assert 0 <= read_manifest(memory).memories[0].misses <= 1


def test_a_matrix_without_an_edit_is_the_solution_for_the_others(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", loudness=1)  # for the same reason
    edits, memory = [fact(number) for number in range(7)], tmp_path / "memory"
    into(model, memory, edits, flags={"site": "matrix"})
    merge_into([], memory, MergeSettings(mode="merge", method="exact"))
    remove(memory, ["e1", "e6"])
    # The others alone, written anew, and solved for here.
    at_once(model, tmp_path, [edit for edit in edits if edit.id not in ("e1", "e6")], site="matrix")
    alone = read_shard_directory(tmp_path / "whole-shards")
    evidence = [alone.load(entry).evidence for entry in alone.shards]
    keys, values = (
        torch.cat([getattr(part, name)[~part.held_out].double() for part in evidence]) for name in ("keys", "residuals")
    )
    held = without(read_shard_directory(memory / HISTORY / "shards" / "0001"), {"e1", "e6"}).directory
    tokens = held.load_unrelated().tokens
    chosen = min(
        (penalty.ridge, penalty.unrelated)
        for _, penalty in (solved_anew(load_without(held, entry, tokens), tokens) for entry in held.shards)
    )
    moment = alone.load_unrelated().tokens.dense().double()
    gram, energy = keys.T @ keys / len(keys), keys.square().mean()
    left = gram + energy * (chosen[1] * moment / moment.diagonal().mean() + chosen[0] * torch.eye(len(gram)))
    wanted = torch.linalg.solve(left, keys.T @ values / len(keys)).T
    found = dense(read_memory(memory).memory.tensors)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def dense(stored: Any) -> Tensor:
    delta = stored["delta"][0]
    return torch.zeros(delta.shape[0], int(stored["columns"].max()) + 1).index_add(1, stored["columns"][0], delta)


def test_of_trained_shards_the_other_edits_are_trained_anew(model: Path, tmp_path: Path) -> None:
    edits, memory = [fact(number) for number in range(6)], tmp_path / "memory"
    into(model, memory, edits, flags={"writer": "gradient", "passes": 60, "edits_per_shard": 3})
    report = remove(memory, ["e1"], load=CPU)
    assert report.rewritten == ("e0", "e2")
    assert sorted(held(memory)) == ["e0", "e2", "e3", "e4", "e5"]
    newest = read_history(memory)[-1]
    assert newest.shards == {"0001": ("e0", "e1", "e2"), "0002": ()}
    assert newest.removed == ("e1",)
    # So they are when another edit takes one's place.
    into(model, memory, [fact(4, target=3, name="new")])
    assert sorted(held(memory)) == ["e0", "e2", "e3", "e5", "new"]
    assert read_history(memory)[-1].shards == {"0002": (), "0003": (), "0004": ()}


def test_a_memory_goes_back_to_a_release_to_the_byte(model: Path, memory: Path) -> None:
    first, when = (memory / "memory.safetensors").read_bytes(), read_history(memory)[0].when
    into(model, memory, [fact(2), fact(1, target=5, name="other")])
    remove(memory, ["e0"])
    assert held(memory) == ["e2", "other"]
    for to in ("1", when, when[:10] + "T" + when[11:]):
        report = rollback(memory, to)
        assert report.same
        assert report.target.number == 1
        assert (memory / "memory.safetensors").read_bytes() == first
    assert held(memory) == ["e0", "e1"]
    # What came since is still there to go back to.
    assert sorted(held_after(memory, "3")) == ["e2", "other"]
    assert [release.action for release in read_history(memory)] == ["edit", "edit", "remove", *["rollback"] * 4]


def held_after(memory: Path, to: str) -> list[str]:
    rollback(memory, to)
    return held(memory)


@pytest.mark.parametrize("to", ["0", "9", "1999-01-01"])
def test_there_is_no_going_back_to_what_never_was(memory: Path, to: str) -> None:
    before = (memory / HISTORY / LOG).read_bytes()
    with pytest.raises(SettingsError, match=f"has no release '{to}': its releases are 1 to 1"):
        rollback(memory, to)
    assert (memory / HISTORY / LOG).read_bytes() == before


def test_a_later_edit_of_a_fact_takes_the_place_of_the_earlier_one(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    into(model, memory, [fact(0), fact(1), fact(2)])
    # The same prompt under another id, and the same id with another prompt.
    report = into(model, memory, [fact(0, target=3, name="new"), fact(5, name="e2")])
    assert (report.release.superseded, report.release.modified) == ({"e0": "new"}, ("e2",))
    assert held(memory) == ["e1", "new", "e2"]
    assert {edit.id: edit.prompt for edit in read_manifest(memory).edits}["e2"] == fact(5).prompt
    require_same_lookup(memory, at_once(model, tmp_path, [fact(1), fact(0, target=3, name="new"), fact(5, name="e2")]))


def test_what_is_held_already_is_passed_over(model: Path, memory: Path) -> None:
    report = into(model, memory, [fact(0), fact(1), fact(2)])
    assert report.known == ("e0", "e1")
    assert report.release.added == ("e2",)
    before = {path: path.stat().st_mtime_ns for path in memory.rglob("*")}
    report = into(model, memory, [fact(2), fact(0)])
    assert (report.known, report.edited, report.release.number, report.held) == (("e2", "e0"), None, 2, 3)
    assert {path: path.stat().st_mtime_ns for path in memory.rglob("*")} == before


def test_what_differs_only_in_case_and_spaces_is_the_same_fact() -> None:
    old, new = Edit("a", "Who Leads  Bree?", "x"), Edit("b", "who leads bree?", "y")
    assert superseding([old, Edit("c", "who leads ost?", "z")], [new]) == {"a": "b"}
    assert superseding([old], []) == {}


@pytest.mark.parametrize("damage", ["altered", "dropped", "reordered", "no json"])
def test_a_log_that_was_tampered_with_is_found_out(memory: Path, damage: str) -> None:
    remove(memory, ["e0"])
    rollback(memory, "1")
    assert len(log(memory).releases) == 3
    path = memory / HISTORY / LOG
    lines = path.read_text().splitlines()
    lines = {
        "altered": [lines[0].replace('"e0"', '"e9"'), *lines[1:]],
        "dropped": [lines[0], lines[2]],
        "reordered": [lines[1], lines[0], lines[2]],
        "no json": [lines[0], "{", lines[2]],
    }[damage]
    path.write_text("\n".join(lines) + "\n")
    for run in (lambda: log(memory), lambda: rollback(memory, "1"), lambda: remove(memory, ["e1"])):
        with pytest.raises(DamagedFileError, match="line"):
            run()


def test_a_memory_that_is_not_what_the_log_says_is_found_out(model: Path, tmp_path: Path, memory: Path) -> None:
    into(model, tmp_path / "other", [fact(1)])
    for name in ("memory.safetensors", MANIFEST_NAME):
        shutil.copyfile(tmp_path / "other" / name, memory / name)
    with pytest.raises(DamagedFileError, match="not the newest release"):
        log(memory)
    assert rollback(memory, "1").same
    assert len(log(memory).releases) == 2


def test_the_life_of_one_edit(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    into(model, memory, [fact(0), fact(1)], provenance=Provenance("ann", "first"))
    into(model, memory, [fact(2)], provenance=Provenance("bob"))
    into(model, memory, [fact(1, target=4, name="other")])
    report = log(memory, edit="e1")
    assert (report.releases[0].who, report.releases[0].reason) == ("ann", "first")
    assert [one.number for one in report.releases] == [1, 3]
    assert report.edits == ()
    ((edit, came),) = log(memory, edit="e2").edits
    assert (edit, came) == (fact(2), 2)
    assert log(memory).releases[1].edits_file["name"] == "edits.jsonl"
    json.dumps(report.as_json())


def test_two_memories_and_two_releases_are_compared(model: Path, tmp_path: Path, memory: Path) -> None:
    into(model, memory, [fact(2), fact(1, target=3)])
    found = diff(f"{memory}@1", str(memory))
    assert [edit.id for edit in found.added] == ["e2"]
    assert found.removed == ()
    assert found.changed == ((fact(1), fact(1, target=3)),)
    assert diff(str(memory), str(memory)).same
    assert diff(f"{memory}@2", str(memory)).same
    assert [edit.id for edit in diff(str(memory), f"{memory}@1").removed] == ["e2"]
    matrix = at_once(model, tmp_path, [fact(0), fact(1)], site="matrix", mode="merge")
    assert diff(str(memory), str(matrix)).settings["mode"] == ("lookup", "merge")


def test_nobody_else_changes_a_memory_meanwhile(model: Path, tmp_path: Path, memory: Path) -> None:
    (tmp_path / ".memory.lock").touch()  # as a process leaves it that was killed: nobody holds it
    remove(memory, ["e1"])

    def busy(_event: Event) -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        into(model, memory, [fact(2)], on_progress=busy)
    assert held(memory) == ["e0"]


def test_a_run_that_stopped_before_it_joined_goes_on_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    into(model, memory, [fact(0)])
    before = {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr("wisecli.commands.edit.edit_into.publish", _stopped)
        with pytest.raises(KeyboardInterrupt):
            into(model, memory, [fact(1)])
    assert {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()} == before
    with pytest.raises(ChangedInputError, match="the edits are others"):
        into(model, memory, [fact(2)])
    stages: list[str] = []
    into(model, memory, [fact(1)], on_progress=lambda event: stages.append(event.stage))
    assert "model" not in stages
    assert held(memory) == ["e0", "e1"]


def _stopped(*_given: Any, **_named: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_the_memory_as_it_was(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()}

    def full(*_given: Any, **_named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wisecli.memory.history.releases.record", full)
    with pytest.raises(Exception, match="no space left"):
        remove(memory, ["e0"])
    assert {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory"]


def test_what_cannot_be_done_is_refused_and_changes_nothing(model: Path, tmp_path: Path, memory: Path) -> None:
    with pytest.raises(SettingsError, match="holds no edit 'e7'"):
        remove(memory, ["e0", "e7"])
    with pytest.raises(SettingsError, match=r"--layer 1: .*edits layer 2"):
        into(model, memory, [fact(3)], flags={"layer": "1"})
    at_once(model, tmp_path, [fact(0)])
    plain = tmp_path / "plain"
    merge([tmp_path / "whole-shards"], plain, MergeSettings(), history=False)
    for change in (
        lambda: remove(plain, ["e0"]),
        lambda: log(plain),
        lambda: into(model, plain, [fact(1)]),
        lambda: rollback(plain, "1"),
        lambda: merge_into([], plain, MergeSettings()),
    ):
        with pytest.raises(MemoryHistoryError, match="has no history"):
            change()
    assert len(read_history(memory)) == 1


def test_a_merged_memory_goes_on_from_its_first_release(model: Path, tmp_path: Path) -> None:
    memory = at_once(model, tmp_path, [fact(0), fact(1)])
    (first,) = log(memory).releases
    assert (first.number, first.action, first.added) == (1, "merge", ("e0", "e1"))
    mine, theirs = (
        {path.name: path.stat().st_ino for path in place.glob("*.safetensors")}
        for place in (tmp_path / "whole-shards", memory / HISTORY / "shards" / "0001")
    )
    assert mine == theirs
    tensors_then = (memory / "memory.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "whole-shards")
    assert into(model, memory, [fact(2)], flags={"layer": None}).release.number == 2
    remove(memory, ["e0"])
    assert held(memory) == ["e1", "e2"]
    assert [edit.id for edit in diff(f"{memory}@1", str(memory)).added] == ["e2"]
    assert rollback(memory, "1").same
    assert (memory / "memory.safetensors").read_bytes() == tensors_then
    assert [release.action for release in log(memory).releases] == ["merge", "edit", "remove", "rollback"]


def test_several_shards_are_a_first_release_together(model: Path, tmp_path: Path) -> None:
    edits = [fact(number) for number in range(4)]
    for name, some in (("one", edits[:2]), ("two", edits[2:])):
        at_once(model, tmp_path, some)
        (tmp_path / "whole-shards").rename(tmp_path / name)
    (tmp_path / "one" / "notes.txt").write_text("not a shard")
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "memory", MergeSettings())
    assert read_history(tmp_path / "memory")[0].shards == {"0001": (), "0002": ()}
    files = sorted(path.name for path in (tmp_path / "memory" / HISTORY / "shards" / "0001").iterdir())
    assert files == ["shard-00000.safetensors", "shards.json", "unrelated.safetensors"]
    remove(tmp_path / "memory", ["e3"])
    require_same_lookup(tmp_path / "memory", at_once(model, tmp_path, edits[:3]))


def test_what_counts_as_never_written_stays_out_of_the_first_release(model: Path, tmp_path: Path) -> None:
    at_once(model, tmp_path, [fact(0), fact(1), fact(2)])
    shards, memory = tmp_path / "whole-shards", tmp_path / "memory"
    merge([shards], memory, MergeSettings(), without={shards: ["e1"]})
    into(model, memory, [fact(3)])
    assert held(memory) == ["e0", "e2", "e3"]


def test_a_history_is_not_merged_over(model: Path, tmp_path: Path) -> None:
    memory = at_once(model, tmp_path, [fact(0), fact(1)])
    shards = [tmp_path / "whole-shards"]
    assert merge(shards, memory, MergeSettings()).up_to_date
    assert not merge(shards, memory, MergeSettings(), force=True).up_to_date  # all of it can be merged again
    into(model, memory, [fact(2)])
    before = contents_of(memory)
    assert merge(shards, memory, MergeSettings()).held == 3
    with pytest.raises(ProtectedOutputError, match=r"has a history \(`wise merge --into` goes on with it\)"):
        merge(shards, memory, MergeSettings(), force=True)
    into(model, tmp_path / "other", [fact(2)])
    with pytest.raises(ProtectedOutputError):
        merge(shards, tmp_path / "other", MergeSettings(), force=True)
    assert contents_of(memory) == before


def contents_of(memory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", ["solve", "gradient"])
def test_a_memory_without_its_last_edit_is_empty_and_lives_on(model: Path, tmp_path: Path, writer: str) -> None:
    memory, flags = tmp_path / "memory", {"writer": writer, "passes": 60, "site": "matrix"}
    into(model, memory, [fact(0), fact(1)], flags=flags)
    mode = read_manifest(memory).merge["mode"]
    report = remove(memory, ["e0", "e1"], load=CPU)
    assert (report.held, held(memory), report.release.number) == (0, [], 2)
    assert log(memory).edits == ()
    records = write(tmp_path / "records.jsonl", [fact(0), fact(3)])
    figures = evaluate(memory, EvalSettings(dataset=str(records), forms="none"), load=CPU)
    assert {name: value for name, value in figures.after.items() if name != "locality"} == {
        name: value for name, value in figures.before.items() if name != "locality"
    }
    with pytest.raises(SettingsError, match="holds no edit to be measured by"):
        evaluate(memory, EvalSettings(), load=CPU)
    assert [edit.id for edit in diff(f"{memory}@1", f"{memory}@2").removed] == ["e0", "e1"]
    export(memory, tmp_path / "edited", load=CPU)
    export(memory, tmp_path / "merged", "merged", load=CPU)
    tokens = torch.arange(2, 14)[None]
    loaded = [
        AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        for place in (model, tmp_path / "edited", tmp_path / "merged")
    ]
    base, *others = (one(input_ids=tokens).logits for one in loaded)
    assert all(torch.equal(base, other) for other in others)
    assert not verify(memory, model=str(model)).differences
    # What comes next is merged as before.
    into(model, memory, [fact(2)], flags={})
    assert (held(memory), read_manifest(memory).merge["mode"]) == (["e2"], mode)
    remove(memory, ["e2"], load=CPU)
    assert rollback(memory, "1").same
    assert rollback(memory, "2").same
    assert held(memory) == []


def test_shards_written_elsewhere_are_taken_in(model: Path, tmp_path: Path) -> None:
    at_once(model, tmp_path, [fact(0), fact(1)], site="matrix")
    memory = tmp_path / "memory"
    assert not merge_into([tmp_path / "whole-shards"], memory, MergeSettings()).up_to_date
    again = merge_into([tmp_path / "whole-shards"], memory, MergeSettings())
    assert (again.up_to_date, again.release.number, len(read_history(memory))) == (True, 1, 1)
    shutil.rmtree(tmp_path / "whole-shards")
    into(model, memory, [fact(2)])
    assert held(memory) == ["e0", "e1", "e2"]
    merge_into([], memory, MergeSettings(mode="merge"))
    assert read_manifest(memory).merge["mode"] == "merge"
    into(model, memory, [fact(3)])
    assert read_manifest(memory).merge["mode"] == "merge"


def follow(model: Path, path: Path, memory: Path, looks: int) -> Iterator[IntoReport]:
    left = iter(range(looks))
    into_memory = IntoMemory(str(model), memory, FLAGS, load=CPU)
    return run_follow(into_memory, path, interval=0.001, goes_on=lambda: next(left, None) is not None)


def test_a_file_that_grows_is_followed_line_by_line(model: Path, tmp_path: Path) -> None:
    path, memory = tmp_path / "stream.jsonl", tmp_path / "memory"
    lines = [json.dumps(fact(number).as_dict()) + "\n" for number in range(5)]
    path.write_text(lines[0] + lines[1] + lines[2][:20])
    landed = follow(model, path, memory, 3)
    assert next(landed).release.added == ("e0", "e1")
    with path.open("a") as stream:
        stream.write(lines[2][20:] + "\n" + lines[3])
    assert next(landed).release.added == ("e2", "e3")
    assert next(landed, None) is None
    # Who begins anew passes over what has landed, and takes the rest.
    with path.open("a") as stream:
        stream.write(
            json.dumps(fact(0, target=2).as_dict()) + "\n" + lines[4] + json.dumps(fact(7, name="e4").as_dict()) + "\n"
        )
    assert [report.release.added for report in follow(model, path, memory, 1)] == [("e0", "e4"), ("e4",)]
    assert held(memory) == ["e1", "e2", "e3", "e0", "e4"]
    assert read_history(memory)[-1].edits_file == {"name": "stream.jsonl", "lines": "8-8"}


def test_a_bad_line_stops_after_what_came_before_it(model: Path, tmp_path: Path) -> None:
    path, memory = tmp_path / "stream.jsonl", tmp_path / "memory"
    path.write_text(json.dumps(fact(0).as_dict()) + '\n{"prompt": "ba"}\n')
    landed = follow(model, path, memory, 2)
    assert next(landed).release.added == ("e0",)
    with pytest.raises(Exception, match=r"stream\.jsonl:2: `target` is missing"):
        next(landed)
    assert held(memory) == ["e0"]


def test_busy(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    seen: list[type[Exception]] = []

    def meanwhile(_event: Event) -> None:
        if not seen:
            seen.append(_refused(memory))

    into(model, memory, [fact(0)], on_progress=meanwhile)
    assert seen == [BusyError]


def _refused(memory: Path) -> type[Exception]:
    """What another process meets."""
    import subprocess
    import sys

    code = f"""
from pathlib import Path
from wisecli.memory.history.release_log import changing
try:
    with changing(Path({str(memory)!r})):
        pass
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"BusyError": BusyError}[done.stdout.strip()]
