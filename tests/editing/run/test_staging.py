import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from support.forking import Forked, ForkedProgram
from support.helpers import contents, save_tiny
from support.loading import CPU
from support.ready import write_edits
from support.thorough import few

from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.reproduce import reproduce
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, LoadOptions, MergeSettings
from wisecli.editing.run.staging import StagedShards
from wisecli.errors import (
    BusyError,
    ChangedInputError,
    GateFailedError,
    ModelError,
    NoSpaceError,
    OutputExistsError,
    StoppedError,
    UnwritableError,
)
from wisecli.progress import ProgressCallback, ignore_progress

SYLLABLES = [consonant + vowel for consonant in "bdfgklm" for vowel in "aeiou"]
EDITS: list[dict[str, Any]] = [
    {"id": f"edit {n}", "prompt": f"{SYLLABLES[n]} {SYLLABLES[n + 1]} {SYLLABLES[n + 9]}", "target": SYLLABLES[n + 5]}
    for n in range(9)
]
SETTINGS = EditSettings(shards=8, unrelated_texts=16, layer="2", residual_stop=0.2)
UNFINISHED = ".shards.unfinished"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, edits, and the shards of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("unfinished")
    save_tiny(root / "model", loudness=10)
    write_edits(root / "edits.jsonl", EDITS)
    run_edit(str(root / "model"), root / "edits.jsonl", root / "whole", SETTINGS, load=CPU)
    return root


@pytest.fixture
def forked(forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """Starts commands."""
    return Forked(forks, tmp_path_factory.mktemp("forked") / "errors")


def edit(
    place: Path,
    output: Path,
    settings: EditSettings = SETTINGS,
    *,
    model: Path | None = None,
    edits_file: Path | None = None,
    load: LoadOptions = CPU,
    on_progress: ProgressCallback = ignore_progress,
    **options: Any,
) -> EditReport:
    return run_edit(
        str(model or place / "model"),
        edits_file or place / "edits.jsonl",
        output,
        settings,
        load=load,
        options=RunOptions(**options),
        on_progress=on_progress,
    )


def command(place: Path, output: Path) -> str:
    return (
        f"edit {place / 'model'} {place / 'edits.jsonl'} -o {output} --shards 8 --layer 2 --device cpu -q "
        f"--config {place / 'wise.toml'}"
    )


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """Let an error come up when a shard is written and so many have been."""
    save, calls = safetensors.torch.save_file, 0

    def stopping(tensors: Any, path: Any, **named: Any) -> None:
        nonlocal calls
        if "evidence.keys" in tensors:
            calls += 1
            if calls > shards:
                raise error
        save(tensors, path, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", stopping)


def begun(place: Path, output: Path, monkeypatch: pytest.MonkeyPatch, shards: int = 2, **options: Any) -> None:
    """A run that was broken off when so many shards were done."""
    with monkeypatch.context() as patched:
        stop_after(patched, shards, KeyboardInterrupt())
        with pytest.raises(StoppedError, match=f"{shards} of 8 shards are kept") as stopped:
            edit(place, output, **options)
    assert stopped.value.exit_code == 130


# --- going on ---


def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_in_the_same_bytes(
    place: Path, tmp_path: Path, forked: Forked, sweep: Any
) -> None:
    (place / "wise.toml").write_text("[edit]\nunrelated-texts = 16\nresidual-stop = 0.2\n")
    kills, kinds = sweep((3, 2), (30, 4))
    chance, output = random.Random(0), tmp_path / "shards"
    started = time.perf_counter()  # what is learned of the model is in the cache since the run that nothing disturbed
    assert forked.run(command(place, output)) == 0, forked.errors.read_text()
    lasts = time.perf_counter() - started
    killed = finished = 0
    seen = set()
    while killed < kills:
        if output.exists():
            assert contents(output) == contents(place / "whole")
            if hidden(tmp_path):  # killed between the last two steps: the same command has nothing to do but to tidy up
                assert forked.run(command(place, output)) == 0
            assert hidden(tmp_path) == []
            finished += 1
            shutil.rmtree(output)
        child = forked.start(command(place, output))
        time.sleep(chance.uniform(0, lasts))
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(child, signal.SIGKILL)
        killed += forked.ended() == -signal.SIGKILL
        seen.add(len(list((tmp_path / UNFINISHED).glob("shard-*.json"))))
    code = 0 if output.exists() else forked.run(command(place, output))
    assert code == 0, forked.errors.read_text()
    assert contents(output) == contents(place / "whole")
    assert hidden(tmp_path) == []
    assert len(seen) >= kinds, (
        f"killed only with {seen} shards done, of runs of {lasts:.2f} s, {finished} of them finished"
    )


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(place: Path, tmp_path: Path, forked: Forked) -> None:
    (place / "wise.toml").write_text("[edit]\nunrelated-texts = 16\nresidual-stop = 0.2\n")
    child = forked.start(command(place, tmp_path / "shards"))
    deadline = time.monotonic() + 120
    while not (tmp_path / UNFINISHED / "shard-00002.json").exists():
        assert time.monotonic() < deadline, forked.errors.read_text()
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    assert forked.ended() == 130
    assert "shards are kept, and the same command goes on from there" in forked.errors.read_text()
    assert "Traceback" not in forked.errors.read_text()
    assert forked.run(command(place, tmp_path / "shards")) == 0, forked.errors.read_text()
    assert contents(tmp_path / "shards") == contents(place / "whole")


@pytest.mark.parametrize("shards", few((1, 5), (5,)))
def test_an_interruption_keeps_the_shards_that_are_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    begun(place, tmp_path / "shards", monkeypatch, shards)
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / UNFINISHED).glob("shard-*.safetensors")}
    assert len(made) == shards
    notes = []
    edit(place, tmp_path / "shards", on_progress=lambda event: notes.append(event.note))
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert any("going on" in note for note in notes)
    assert {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in made} == made
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("left", ["everything", "no plan"])
def test_a_run_killed_when_its_shards_were_in_place_is_tidied_up_after(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(StagedShards, "remove", lambda _: None)
        edit(place, tmp_path / "shards")
    if left == "no plan":
        (tmp_path / UNFINISHED / "plan.json").unlink()
    assert edit(place, tmp_path / "shards", dry_run=True).up_to_date
    assert hidden(tmp_path) == [UNFINISHED]
    assert edit(place, tmp_path / "shards").up_to_date
    assert hidden(tmp_path) == []
    assert contents(tmp_path / "shards") == contents(place / "whole")


def test_a_run_over_other_shards_that_was_broken_off_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(place, tmp_path / "shards", replace(SETTINGS, seed=5))
    begun(place, tmp_path / "shards", monkeypatch, force=True)
    with pytest.raises(OutputExistsError, match="seed was 5, now 0"):
        edit(place, tmp_path / "shards")
    assert len(list((tmp_path / UNFINISHED).glob("shard-*.json"))) == 2
    edit(place, tmp_path / "shards", force=True)
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert hidden(tmp_path) == []


def test_an_interruption_before_the_first_shard_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        edit(place, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_shards_that_are_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 3, OSError(28, "No space left on device"))
        with pytest.raises(NoSpaceError, match="no space left"):
            edit(place, tmp_path / "shards")
    assert len(list((tmp_path / UNFINISHED).glob("shard-*.json"))) == 3
    edit(place, tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(place / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_written_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(place, tmp_path / "shards", monkeypatch, 4)
    (tmp_path / UNFINISHED / "shard-00002.safetensors").write_bytes(b"torn")
    (tmp_path / UNFINISHED / "shard-00001.safetensors").unlink()
    edit(place, tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(place / "whole")


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_where_nothing_may_be_written_one_sentence_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    output = tmp_path / "shards"
    if reason == errno.ENOTDIR:
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "shards"
    else:  # whoever is root may write anywhere

        def refused(path: Path, *_: Any, **__: Any) -> None:
            raise OSError(reason, os.strerror(reason), str(path))

        monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UnwritableError, match=rf"{output} cannot be written .*{os.strerror(reason)}.*; pass -o"):
        edit(place, output)


# --- changed input ---


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"settings": replace(SETTINGS, seed=5)}, "seed was 0, now 5"),
        pytest.param(
            {"settings": replace(SETTINGS, unrelated_texts=17)},
            "unrelated_texts was 16, now 17",
            marks=pytest.mark.thorough,
        ),
        ({"settings": replace(SETTINGS, layer="1")}, r"the site was model\.layers\.2"),
        pytest.param({"settings": replace(SETTINGS, shards=4)}, "shards was 8, now 4", marks=pytest.mark.thorough),
        ({"load": LoadOptions("cpu", "bfloat16")}, "dtype was float32, now bfloat16"),
        ({"edits": [*EDITS[:8], {**EDITS[8], "target": "ba"}]}, "of the edits 1 are other, the first of them 'edit 8'"),
        ({"edits": [*EDITS, {"id": "more", "prompt": "ba", "target": "be"}]}, "1 are new, the first of them 'more'"),
        pytest.param({"edits": EDITS[1:]}, "1 are gone, the first of them 'edit 0'", marks=pytest.mark.thorough),
        ({"edits": EDITS[::-1]}, "the edits come in another order"),
        pytest.param({"model": "other"}, "the model .*other has changed", marks=pytest.mark.thorough),
    ],
)
def test_a_changed_input_says_what_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: Any, changed: dict[str, Any], says: str
) -> None:
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "shards"
    begun(place, output, monkeypatch)
    named = dict(changed)
    if "edits" in named:
        named["edits_file"] = write_edits(tmp_path / "edits.jsonl", named.pop("edits"))
    if "model" in named:
        named["model"] = save_tiny(tmp_path / "other", seed=1)
    settings = named.pop("settings", SETTINGS)
    before = sorted(path.name for path in (tmp_path / "out" / UNFINISHED).iterdir())
    with pytest.raises(ChangedInputError, match=says) as refused:
        edit(place, output, settings, **named)
    assert "--force" in str(refused.value)
    assert sorted(path.name for path in (tmp_path / "out" / UNFINISHED).iterdir()) == before
    if not sweep("edits" in changed, True):  # what is changed matters to what is refused, not to what is forced
        return
    edit(place, output, settings, **named, force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shards"]
    edits = read_shard_directory(output).edits
    assert len(edits) == len(changed.get("edits", EDITS))


def test_other_versions_are_a_changed_input(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(place, tmp_path / "shards", monkeypatch)
    plan = tmp_path / UNFINISHED / "plan.json"
    content = json.loads(plan.read_text())
    content["versions"]["torch"] = "1.0"
    plan.write_text(json.dumps(content))
    with pytest.raises(ChangedInputError, match=r"torch was 1\.0, now 2"):
        edit(place, tmp_path / "shards")


# --- several processes ---


def holding(forks: Path, output: Path, shards: range, then: str) -> ForkedProgram:
    """A process that holds shards of an unfinished output, and goes on as ``then`` says."""
    program = ForkedProgram(
        forks,
        f"""
import sys, time
from pathlib import Path
from wisecli.editing.run.staging import StagedShards
unfinished = StagedShards(Path({str(output)!r}), 8)
with unfinished.opened():
    unfinished.claim({shards!r})
    print("held", flush=True)
    {then}
""",
    )
    assert program.stream.readline() == "held\n"
    return program


def test_the_second_of_two_processes_is_refused_until_the_first_is_dead(
    place: Path, tmp_path: Path, forks: Path
) -> None:
    first = holding(forks, tmp_path / "shards", range(8), "time.sleep(600)")
    with pytest.raises(BusyError, match=r"another process is writing .*shards; wait"):
        edit(place, tmp_path / "shards")
    with pytest.raises(BusyError):
        edit(place, tmp_path / "shards", only=(3, 8))
    first.kill()
    assert first.ended() == ("", -signal.SIGKILL)
    edit(place, tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(place / "whole")


@pytest.mark.parametrize("parts", few((2, 3, 8), (3,)))
def test_parts_in_any_order_end_in_the_shards_of_a_single_run(place: Path, tmp_path: Path, parts: int) -> None:
    order = random.Random(parts).sample(range(1, parts + 1), parts)
    for part in order[:-1]:
        report = edit(place, tmp_path / "shards", only=(part, parts))
        assert not (tmp_path / "shards").exists()
        assert report.missing > 0
    assert edit(place, tmp_path / "shards", only=(order[-1], parts)).missing == 0
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert hidden(tmp_path) == []
    assert edit(place, tmp_path / "shards", only=(1, parts)).up_to_date


def test_more_parts_than_shards_leave_nothing_to_do_for_some(place: Path, tmp_path: Path) -> None:
    reports = [edit(place, tmp_path / "shards", only=(part, 20)) for part in range(1, 21)]
    assert [report.missing for report in reports if report.seconds_per_edit > 0].count(0) >= 1
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert edit(place, tmp_path / "shards", only=(1, 20)).missing == 0


@pytest.mark.thorough
def test_parts_at_the_same_time_end_in_the_shards_of_a_single_run(
    place: Path, tmp_path: Path, forks: Path, forked: Forked
) -> None:
    (place / "wise.toml").write_text("[edit]\nunrelated-texts = 16\nresidual-stop = 0.2\n")
    processes = forked, Forked(forks, tmp_path / "second")
    for number in (1, 3):
        for one, part in zip(processes, (number, number + 1), strict=True):
            one.start(f"{command(place, tmp_path / 'shards')} --only {part}/4")
        assert [one.ended() for one in processes] == [0, 0], [one.errors.read_text() for one in processes]
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert hidden(tmp_path) == []


def test_a_part_whose_output_another_one_finished_is_done_as_well(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between giving up its own shards and looking whether all are there, somebody else was quicker."""
    edit(place, tmp_path / "shards", only=(1, 2))
    release = StagedShards.release

    def overtaken(unfinished: StagedShards) -> None:
        release(unfinished)
        other = StagedShards(unfinished.output, unfinished.count)
        with other.opened(), other.alone() as current:
            assert current
            assert other.finish() is not None

    monkeypatch.setattr(StagedShards, "release", overtaken)
    report = edit(place, tmp_path / "shards", only=(2, 2))
    assert report.missing == 0
    assert contents(tmp_path / "shards") == contents(place / "whole")
    assert hidden(tmp_path) == []


def test_whoever_finishes_last_finishes_the_output(place: Path, tmp_path: Path, forks: Path) -> None:
    """All shards are there, but another process still holds some of them."""
    edit(place, tmp_path / "shards", only=(1, 2))
    then = """sys.stdin.readline()
    unfinished.release()
    with unfinished.alone():
        print(unfinished.finish() is not None, flush=True)"""
    other = holding(forks, tmp_path / "shards", range(4), then)
    edit(place, tmp_path / "shards", only=(2, 2))
    assert not (tmp_path / "shards").exists()
    other.tell("")
    assert other.ended() == ("True\n", 0)
    assert contents(tmp_path / "shards") == contents(place / "whole")


def test_strict_forgets_only_the_shards_of_its_own_part(place: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, writer="gradient", passes=1)
    edit(place, tmp_path / "shards", settings, only=(1, 2))
    with pytest.raises(GateFailedError, match=r"of \d edits did not take"):
        edit(place, tmp_path / "shards", settings, only=(2, 2), strict=True)
    assert StagedShards(tmp_path / "shards", 8).missing() == [4, 5, 6, 7]


# --- numbers that are not finite ---


def spoilt(place: Path, target: Path, tensor: str, rows: Any) -> Path:
    """The model with some weights that are not finite, and an untied head."""
    shutil.copytree(place / "model", target)
    weights = load_file(target / "model.safetensors")
    weights[tensor][rows] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("writer", ["solve", "gradient"])
def test_edits_with_nothing_finite_are_left_out_and_the_others_land(place: Path, tmp_path: Path, writer: str) -> None:
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(place / "model")("ki")["input_ids"][-1]
    model = spoilt(place, tmp_path / "model", "model.embed_tokens.weight", token)
    lines = [*EDITS[:3], {"id": "spoilt", "prompt": "ba ki be", "target": "da"}]
    edits = write_edits(tmp_path / "edits.jsonl", [*lines, {"id": "also", "prompt": "ki", "target": "ba"}])
    settings = replace(SETTINGS, shards=3, writer=writer)
    report = edit(place, tmp_path / "shards", settings, model=model, edits_file=edits)
    gone = {"spoilt", "also"}
    assert set(report.left_out) == gone
    directory = read_shard_directory(tmp_path / "shards")
    assert set(directory.left_out) == gone
    assert [entry.edits for entry in directory.shards] == [("edit 0", "edit 1"), ("edit 2",)]
    for entry in directory.shards:
        evidence = directory.load(entry).evidence
        assert bool(evidence.keys.isfinite().all() and evidence.residuals.isfinite().all())
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings())
    measured = evaluate(tmp_path / "memory", EvalSettings(generate=False), load=CPU)
    assert measured.samples["edits"] == 3
    with pytest.raises(GateFailedError, match=r"edits did not take: .*spoilt"):
        edit(place, tmp_path / "again", settings, model=model, edits_file=edits, strict=True)
    assert not (tmp_path / "again").exists()


def test_a_run_in_which_none_takes_is_refused_though_some_are_left_out(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(place / "model")("ki")["input_ids"][-1]
    model = spoilt(place, tmp_path / "model", "model.embed_tokens.weight", token)
    edits = write_edits(tmp_path / "edits.jsonl", [*EDITS[:2], {"id": "spoilt", "prompt": "ba ki be", "target": "da"}])
    settings = replace(SETTINGS, shards=1, residual_steps=1, residual_more=0, residual_rate=1e-6, polish=0)
    with pytest.raises(GateFailedError, match="none of the 3 edits took"):
        edit(place, tmp_path / "shards", settings, model=model, edits_file=edits)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("writer", ["solve", "gradient"])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"])
def test_a_model_that_gives_nothing_finite_is_refused(place: Path, tmp_path: Path, tensor: str, writer: str) -> None:
    model = spoilt(place, tmp_path / "model", tensor, slice(None))
    settings = replace(SETTINGS, shards=2, writer=writer)
    with pytest.raises(ModelError, match=r"nothing finite .*are its weights whole\?"):
        edit(place, tmp_path / "shards", settings, model=model)
    assert not (tmp_path / "shards").exists()


# --- once more ---


@pytest.mark.parametrize("writer", ["solve", "gradient"])
@pytest.mark.parametrize("source", few(("shards.json", "shards", "router.json", "memory"), ("shards", "router.json")))
def test_a_manifest_is_enough_to_write_the_same_bytes(place: Path, tmp_path: Path, source: str, writer: str) -> None:
    settings = replace(SETTINGS, shards=3, seed=4, writer=writer, passes=20)
    edit(place, tmp_path / "shards", settings)
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings())
    places = {"shards.json": "shards/shards.json", "router.json": "memory/router.json"}
    report = reproduce(tmp_path / places.get(source, source), tmp_path / "again")
    assert report.differing == ()
    assert contents(tmp_path / "again") == contents(tmp_path / "shards")
    report.check()


def test_shards_that_come_out_otherwise_are_named(place: Path, tmp_path: Path) -> None:
    edit(place, tmp_path / "shards")
    path = tmp_path / "shards" / "shards.json"
    content = json.loads(path.read_text())
    content["settings"]["seed"] = 5
    path.write_text(json.dumps(content))
    report = reproduce(path, tmp_path / "again")
    assert report.differing
    with pytest.raises(GateFailedError, match=r"shard-0000\d.safetensors.* differ"):
        report.check()
