import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from support.helpers import WORDS, alone, contents, save_tiny
from support.history import batch_from, held, write
from support.loading import CPU

from wisecli import cli
from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.edit_into import IntoMemory, IntoReport, edit_into
from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.edit.watch import follow
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, LoadOptions, MergeSettings
from wisecli.editing.run.worker import Worker
from wisecli.edits.checks.admission import DEFAULT_ADMISSION, NO_CHECKS, Admission
from wisecli.edits.checks.policy import read_policy
from wisecli.edits.record import Edit
from wisecli.errors import ChangedInputError, ConflictError, PolicyError, StoppedError
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import encode
from wisecli.progress import Event, ProgressCallback, ignore_progress

QUICK = EditSettings(unrelated_texts=16, layer="2", residual_stop=0.2)
FLAGS: dict[str, Any] = {"unrelated_texts": 16, "layer": "2", "residual_stop": 0.2}
PLAIN = [
    Edit("one", "ba be bi", "do du", rephrases=("bi be ba",)),
    Edit("two", "ka ke ki ko", "fa"),
    Edit("three", "ma me", "ga ge gi"),
]
AGAIN, BACK = Edit("again", "BA be  bi", "fu"), Edit("back", "ba be bi", "do du")


class Place(NamedTuple):
    """A model, and edits of which it knows the first."""

    model: Path
    known: Edit
    edits: list[Edit]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    model = save_tiny(tmp_path_factory.mktemp("gate") / "model")
    loaded = load_model(model, load=CPU)
    said = ((word, int(alone(loaded.model, encode(loaded.tokenizer, word, "ba"))[-1].argmax())) for word in WORDS)
    prompt, token = next((word, token) for word, token in said if token > 1)
    known = Edit("known", prompt, loaded.tokenizer.decode([token]))
    return Place(model, known, [PLAIN[0], known, *PLAIN[1:]])


def run(
    place: Place,
    edits: Sequence[Edit],
    output: Path,
    *,
    settings: EditSettings = QUICK,
    load: LoadOptions = CPU,
    options: RunOptions = RunOptions(),
    admission: Admission = DEFAULT_ADMISSION,
    on_progress: ProgressCallback = ignore_progress,
) -> EditReport:
    file = write(output.parent / "edits.jsonl", edits)
    return run_edit(
        str(place.model),
        file,
        output,
        settings,
        load=load,
        options=options,
        admission=admission,
        on_progress=on_progress,
    )


def into(place: Place, memory: Path, edits: Sequence[Edit], admission: Admission = DEFAULT_ADMISSION) -> IntoReport:
    batch = batch_from(write(memory.parent / "edits.jsonl", edits))
    return edit_into(IntoMemory(str(place.model), memory, FLAGS, load=CPU, admission=admission), batch)


def landed(directory: Path) -> list[str]:
    return [edit.id for edit in read_shard_directory(directory).edits]


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "edits.jsonl")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""
    monkeypatch.setattr("wisecli.editing.run.base_model.load_model", lambda *_, **__: pytest.fail("loaded"))


def test_conflicts_are_refused_before_a_model_is_loaded(place: Place, tmp_path: Path, unloaded: None) -> None:
    with pytest.raises(ConflictError) as caught:
        run(place, [*PLAIN, AGAIN, BACK], tmp_path / "shards")
    file = tmp_path / "edits.jsonl"
    assert caught.value.exit_code == 2
    assert [sentence.split(": ")[0] for sentence in caught.value.details] == [f"{file}:4", f"{file}:5"]
    assert all(f"at {file}:" in sentence for sentence in caught.value.details)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "kept", "dropped"),
    [("latest", ["two", "three", "back"], [1, 4]), ("skip", ["one", "two", "three"], [4, 5])],
)
def test_conflicts_are_resolved_as_asked(
    place: Place, tmp_path: Path, how: Any, kept: list[str], dropped: list[int]
) -> None:
    report = run(place, [*PLAIN, AGAIN, BACK], tmp_path / "shards", admission=Admission(on_conflict=how))
    assert landed(tmp_path / "shards") == kept
    assert (report.edits, [one.line for one in report.sifted.dropped]) == (3, dropped)


def test_what_only_a_rephrase_says_is_told_and_trained(place: Place, tmp_path: Path) -> None:
    events: list[Event] = []
    edits = [*PLAIN, Edit("other", "bi be ba", "fu")]
    report = run(place, edits, tmp_path / "shards", on_progress=events.append)
    assert landed(tmp_path / "shards") == ["one", "two", "three", "other"]
    assert len(report.sifted.conflicts) == 1
    assert [event.note for event in events if event.note.startswith(report.sifted.conflicts[0])]
    with pytest.raises(ConflictError, match="rephrase"):
        run(place, edits, tmp_path / "refused", admission=Admission(on_conflict="error"))


def test_a_benchmark_is_edited_as_it_is(place: Place, tmp_path: Path) -> None:
    run(place, [*PLAIN, AGAIN], tmp_path / "shards", admission=NO_CHECKS)
    assert landed(tmp_path / "shards") == ["one", "two", "three", "again"]


def test_where_facts_are_from_is_kept_and_changes_no_shard(place: Place, tmp_path: Path) -> None:
    sourced = [replace(edit, who="ann", when="2026-11-20", source="minutes") for edit in PLAIN]
    for name, edits in (("plain", PLAIN), ("sourced", sourced)):
        run(place, edits, tmp_path / name)
        merge([tmp_path / name], tmp_path / f"{name}-memory", MergeSettings())
        written = read_manifest(tmp_path / f"{name}-memory").edits
        assert list(written) == list(read_shard_directory(tmp_path / name).edits) == edits
    assert contents(tmp_path / "plain") == contents(tmp_path / "sourced")
    listed = inspect(tmp_path / "sourced-memory").as_json()["results"]["edits"]["listed"][0]
    assert (listed["who"], listed["when"], listed["source"]) == ("ann", "2026-11-20", "minutes")


def test_a_manifest_from_before_provenance_was_kept_is_read(place: Place, tmp_path: Path) -> None:
    run(place, PLAIN, tmp_path / "shards")
    path = tmp_path / "shards" / "shards.json"
    content = json.loads(path.read_text())
    for edit in content["edits"]:
        for name in ("who", "when", "source"):
            del edit[name]
    path.write_text(json.dumps(content))
    assert list(read_shard_directory(tmp_path / "shards").edits) == PLAIN


@pytest.mark.parametrize("budget", [None, 1])
def test_what_the_model_says_already_is_left_out(place: Place, tmp_path: Path, budget: int | None) -> None:
    report = run(
        place,
        place.edits,
        tmp_path / "shards",
        admission=Admission(skip_known=True),
        load=LoadOptions("cpu", memory_budget=budget),
    )
    assert [(one.id, one.line) for one in report.sifted.known] == [("known", 2)]
    assert (report.edits, landed(tmp_path / "shards")) == (3, ["one", "two", "three"])
    run(place, PLAIN, tmp_path / "without")
    assert contents(tmp_path / "shards") == contents(tmp_path / "without")


def test_the_model_is_loaded_once(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def counted(directory: Path, load: LoadOptions, *, layers: str | None) -> Any:
        loaded.append(directory)
        return load_model(directory, load, layers=layers)

    monkeypatch.setattr("wisecli.editing.run.base_model.load_model", counted)
    run(place, place.edits, tmp_path / "shards", admission=Admission(skip_known=True))
    assert len(loaded) == 1


def test_nothing_is_written_where_the_model_says_it_all(place: Place, tmp_path: Path) -> None:
    report = run(place, [place.known], tmp_path / "shards", admission=Admission(skip_known=True))
    assert (report.edits, report.shards, len(report.sifted.known)) == (0, 0, 1)
    assert left(tmp_path) == []
    report = into(place, tmp_path / "memory", [place.known], admission=Admission(skip_known=True))
    assert (report.release, report.edited, report.held, len(report.sifted.known)) == (None, None, 0, 1)
    assert left(tmp_path) == []


def test_a_dry_run_asks_no_model(place: Place, tmp_path: Path, unloaded: None) -> None:
    report = run(
        place, place.edits, tmp_path / "shards", admission=Admission(skip_known=True), options=RunOptions(dry_run=True)
    )
    assert (report.edits, report.sifted.known) == (4, ())


def test_a_run_that_was_broken_off_goes_on_without_what_is_known(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, admission = replace(QUICK, shards=3), Admission(skip_known=True)
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        write_one = Worker.write

        def stopped(self: Worker, plan: Any, writer: Any, number: int) -> Any:
            if number == 1:
                raise KeyboardInterrupt
            return write_one(self, plan, writer, number)

        patched.setattr(Worker, "write", stopped)
        run(place, place.edits, tmp_path / "shards", settings=settings, admission=admission)
    with pytest.raises(ChangedInputError, match="of the edits 1 are new"):
        run(place, place.edits, tmp_path / "shards", settings=settings, admission=Admission())
    numbers: list[int] = []
    write_all = Worker.write

    def counted(self: Worker, plan: Any, writer: Any, number: int) -> Any:
        numbers.append(number)
        return write_all(self, plan, writer, number)

    monkeypatch.setattr(Worker, "write", counted)
    report = run(place, place.edits, tmp_path / "shards", settings=settings, admission=admission)
    assert (numbers, len(report.sifted.known)) == ([1, 2], 1)
    assert landed(tmp_path / "shards") == ["one", "two", "three"]


def test_parts_agree_on_what_is_known(place: Place, tmp_path: Path) -> None:
    settings, admission = replace(QUICK, shards=3), Admission(skip_known=True)
    for part in (1, 2):
        report = run(
            place,
            place.edits,
            tmp_path / "shards",
            settings=settings,
            admission=admission,
            options=RunOptions(only=(part, 2)),
        )
        assert len(report.sifted.known) == 1
    assert landed(tmp_path / "shards") == ["one", "two", "three"]


def test_a_memory_gives_way_or_not_as_asked(place: Place, tmp_path: Path) -> None:
    memory, reworded = tmp_path / "memory", Edit("reworded", "bi be ba", "fu")
    into(place, memory, PLAIN)
    with pytest.raises(ConflictError, match="in the memory"):
        into(place, memory, [reworded], admission=Admission(on_conflict="error"))
    report = into(place, memory, [reworded], admission=Admission(on_conflict="skip"))
    assert (report.edited, [one.id for one in report.sifted.dropped]) == (None, ["reworded"])
    assert held(memory) == ["one", "two", "three"]
    report = into(place, memory, [reworded, replace(PLAIN[1], id="same")], admission=Admission(on_conflict="latest"))
    assert report.release is not None
    assert report.release.superseded == {"one": "reworded"}
    assert [one.id for one in report.sifted.dropped] == ["same"]
    assert held(memory) == ["two", "three", "reworded"]


def test_a_file_that_grows_does_not_bring_back_what_it_replaced(place: Place, tmp_path: Path) -> None:
    memory, latest = tmp_path / "memory", Admission(on_conflict="latest")
    into(place, memory, PLAIN)
    report = into(place, memory, [*PLAIN, AGAIN], admission=latest)
    assert report.release is not None
    assert report.release.superseded == {"one": "again"}
    report = into(place, memory, [*PLAIN, AGAIN], admission=latest)
    assert (report.edited, held(memory)) == (None, ["two", "three", "again"])
    with pytest.raises(ConflictError, match="'one'"):
        into(place, memory, [*PLAIN, AGAIN])


def test_what_the_model_says_is_trained_where_the_memory_says_otherwise(place: Place, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    into(place, memory, [replace(place.known, id="wrong", target="fu"), PLAIN[0]])
    report = into(place, memory, [place.known, PLAIN[1]], admission=Admission(skip_known=True))
    assert (report.sifted.known, held(memory)) == ((), ["one", "known", "two"])


def test_rules_hold_for_what_a_memory_does_not_have_yet(place: Place, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('maximum_edits = 2\nforbidden_subjects = ["ba be"]\n')
    memory, admission = tmp_path / "memory", Admission(policy=read_policy(tmp_path / "policy.toml"))
    into(place, memory, PLAIN[:1])
    assert into(place, memory, PLAIN, admission=admission).held == 3
    with pytest.raises(PolicyError, match="'ba be'"):
        into(place, memory, [Edit("more", "ta ba be", "fu")], admission=admission)


def test_of_lines_that_are_watched_the_later_counts(place: Place, tmp_path: Path) -> None:
    looks = iter([True, False])
    file = write(tmp_path / "edits.jsonl", [*PLAIN, AGAIN])
    into_memory = IntoMemory(str(place.model), tmp_path / "memory", FLAGS, load=CPU)
    (report,) = follow(into_memory, file, interval=0.01, goes_on=lambda: next(looks))
    assert [one.id for one in report.sifted.dropped] == ["one"]
    assert held(tmp_path / "memory") == ["two", "three", "again"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: list[str]


Wise = Callable[..., Outcome]


@pytest.fixture
def wise(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Wise:
    """Runs `wise edit` on edits, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    for name, value in FLAGS.items():
        monkeypatch.setenv(f"WISE_{name.upper()}", str(value))

    def edit(edits: Sequence[Edit], *flags: str) -> Outcome:
        write(tmp_path / "edits.jsonl", edits)
        monkeypatch.setattr(sys, "argv", ["wise", "edit", str(place.model), "edits.jsonl", *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err.splitlines())

    return edit


def test_every_conflict_is_told_in_a_sentence_before_the_error(wise: Wise, tmp_path: Path) -> None:
    outcome = wise([*PLAIN, AGAIN, BACK])
    assert (outcome.code, outcome.out, left(tmp_path)) == (2, "", [])
    first, second, last = outcome.err
    assert first == (
        "edits.jsonl:4: edit 'again' answers 'fu' to the same prompt, where 'one' at edits.jsonl:1 answers 'do du'"
    )
    assert second.startswith("edits.jsonl:5: edit 'back' goes back to 'do du', which 'one' at edits.jsonl:1 said")
    assert last.startswith("error: edits.jsonl: edits are in conflict 2 times; ")
    (only,) = wise([*PLAIN, AGAIN]).err
    assert only == f"error: {first}; mend the file, or choose with --on-conflict"


def test_what_was_left_out_is_printed(wise: Wise, place: Place) -> None:
    flags = ("--skip-known", "--on-conflict", "latest", "-q")
    outcome = wise([*place.edits, AGAIN], *flags)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "left out: known (line 2): the model says so already" in lines
    assert "left out: one (line 1): it contradicts 'again' at edits.jsonl:5" in lines
    sifted = json.loads(wise([*place.edits, AGAIN], *flags, "--json", "--force").out)["results"]["sifted"]
    assert sifted["known"] == [{"id": "known", "line": 2, "reason": "the model says so already"}]
    assert [one["line"] for one in sifted["dropped"]] == [1]
    nothing = wise([place.known], "--skip-known", "-q", "-o", "none")
    assert nothing.code == 0
    assert "there is nothing to train, and nothing was written" in nothing.out
    outcome = wise([place.known], "--skip-known", "-q", "--into", "memory")
    assert (outcome.code, "no memory was made" in outcome.out) == (0, True)


def test_a_policy_that_is_broken_exits_with_1_before_a_model_is_loaded(
    wise: Wise, tmp_path: Path, unloaded: None
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('require = ["source"]\nallowed_operations = ["insert"]\n')
    for more in ((), ("--into", "memory")):
        outcome = wise(PLAIN, "--policy", "policy.toml", *more)
        assert (outcome.code, outcome.out, len(outcome.err)) == (1, "", 7)
        assert outcome.err[0] == "edits.jsonl:1: edit 'one' does not say `source`, which require asks for"
        assert outcome.err[-1] == "error: edits.jsonl breaks rules 6 times; policy.toml does not allow it"
        assert left(tmp_path) == ["policy.toml"]
    policy.write_text("required = []")
    outcome = wise(PLAIN, "--policy", "policy.toml")
    assert (outcome.code, outcome.err[-1]) == (2, "error: policy.toml: no policy (`required` is unknown)")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_file_that_is_not_as_it_was_signed_exits_with_1(wise: Wise, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", PLAIN)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (tmp_path / "allowed").write_text(f"ann {(tmp_path / 'key.pub').read_text()}")
    subprocess.run(["ssh-keygen", "-Y", "sign", "-q", "-f", tmp_path / "key", "-n", "wise", file], check=True)
    flags = ("--verify-signature", "edits.jsonl.sig", "--signer", "allowed", "--signer-identity", "ann")
    assert wise(PLAIN, *flags).code == 0
    assert wise(PLAIN, *flags, "--into", "memory").code == 0
    before = left(tmp_path)
    for more in (("--force",), ("--into", "memory")):
        outcome = wise([*PLAIN, AGAIN], *flags, *more)
        assert (outcome.code, outcome.out, left(tmp_path)) == (1, "", before)
        (error,) = outcome.err
        assert error.startswith("error: edits.jsonl: edits.jsonl.sig does not hold for it (ssh-keygen: ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--verify-signature edits.jsonl", "--signer"),
        ("--signer edits.jsonl", "--verify-signature"),
        ("--signer-identity ann", "--verify-signature"),
        ("--verify-signature s --signer k --into memory --watch", "--watch"),
        ("--reproduce shards --skip-known", "--reproduce"),
        ("--reproduce shards --policy policy.toml", "--reproduce"),
        ("--reproduce shards", "leave out EDITS"),
        ("--policy nowhere.toml", "nowhere.toml"),
        ("--on-conflict never", "--on-conflict"),
    ],
)
def test_what_cannot_be_asked_together_is_refused(
    wise: Wise, tmp_path: Path, unloaded: None, flags: str, says: str
) -> None:
    (tmp_path / "policy.toml").touch()
    outcome = wise(PLAIN, *flags.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert says in "\n".join(outcome.err)
    assert left(tmp_path) == ["policy.toml"]


def test_a_gated_memory_is_the_same_as_one_of_what_passed(place: Place, tmp_path: Path) -> None:
    for name, edits, admission in (
        ("gated", [*place.edits, AGAIN], Admission(on_conflict="latest", skip_known=True)),
        ("plain", [*PLAIN[1:], AGAIN], Admission()),
    ):
        run(place, edits, tmp_path / name, admission=admission)
        merge([tmp_path / name], tmp_path / f"{name}-memory", MergeSettings())
    first, second = (load_file(tmp_path / f"{name}-memory" / "memory.safetensors") for name in ("gated", "plain"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
