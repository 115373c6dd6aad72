"""A bench that is broken off and asked for again: the same figures, and nothing done twice."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.benching import make_quick, record
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.bench import editing_run, wise_methods
from wisecli.bench.answer_files import AnswerFile, AnswerFolder
from wisecli.bench.compare import BenchReport, bench
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import METHODS, Bench, Method
from wisecli.bench.result_row import ResultRow
from wisecli.commands.memory.merge import merge
from wisecli.config import BenchSettings
from wisecli.editing.run.staging import StagedShards
from wisecli.edits.record import Edit
from wisecli.evaluation.answers import Answer
from wisecli.progress import NOTE, Event

# What depends on the clock and on what else the process holds.
CHANGING = ("seconds_per_edit", "overhead", "peak_rss_bytes")


class BrokenOffError(Exception):
    """As if the machine had been switched off."""


def broken(*_given: Any, **_named: Any) -> Any:
    raise BrokenOffError


def broken_later(call: Callable[..., Any]) -> Callable[..., Any]:
    """What breaks off the second time that it is called: the first is not yet of the edits that are measured."""
    calls: list[None] = []

    def called(*given: Any, **named: Any) -> Any:
        calls.append(None)
        return broken() if len(calls) > 1 else call(*given, **named)

    return called


def placed(root: Path) -> Path:
    """A model and records."""
    save_tiny(root / "model")
    (root / "data.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in range(16)))
    return root


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_quick(monkeypatch)
    monkeypatch.setattr(editing_run, "_EVERY", 0.0)
    return placed(tmp_path)


class Bencher:
    """Runs one bench again and again, and keeps what it was told."""

    def __init__(self, place: Path, methods: str) -> None:
        self.place, self.methods, self.told = place, methods, list[Event]()

    def __call__(self, name: str = "out", *, counts: str = "2,5", **settings: Any) -> BenchReport:
        self.told.clear()
        given = {"methods": self.methods, "counts": counts, "resamples": 20, "protocol": "wild", **settings}
        model, data = str(self.place / "model"), [self.place / "data.jsonl"]
        return bench(
            model, self.place / name, BenchSettings(**given), data=data, load=CPU, on_progress=self.told.append
        )

    def breaks_off(
        self, monkeypatch: pytest.MonkeyPatch, target: str, stopped: Callable[..., Any] = broken, **settings: Any
    ) -> None:
        """Run until something is called that breaks it off."""
        with monkeypatch.context() as patch:
            patch.setattr(target, stopped)
            with pytest.raises(BrokenOffError):
                self(**settings)

    @property
    def notes(self) -> list[str]:
        return [event.note for event in self.told if event.stage == NOTE and event.note.startswith(self.methods)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BenchReport]:
    """Runs a bench that nothing breaks off, once; to be called before anything is broken."""
    root = placed(tmp_path_factory.mktemp("unbroken"))

    @cache
    def run(methods: str, **settings: Any) -> BenchReport:
        return Bencher(root, methods)("-".join(map(str, [methods, *settings.values()])), **settings)

    return run


def require_same(some: Sequence[ResultRow], others: Sequence[ResultRow]) -> None:
    """Equal figures; those of the unedited model only nearly, as it may have been asked in other batches."""
    for row, other in zip(some, others, strict=True):
        one, two = ({name: value for name, value in a["figures"].items() if name not in CHANGING} for a in (row, other))
        assert one.pop("before") == pytest.approx(two.pop("before"), rel=1e-5)
        assert one == two


def breaking_at(monkeypatch: pytest.MonkeyPatch, name: str, fatal: str) -> Callable[[], list[str]]:
    """Let a method break off at an edit; gives the edits that it is given until that is undone."""
    maker, given = METHODS[name], list[str]()

    def made(bench: Bench) -> Method:
        method: Any = maker(bench)
        edit = method.edit

        def told(edits: Sequence[Edit]) -> None:
            if fatal in [one.id for one in edits]:
                raise BrokenOffError
            given.extend(one.id for one in edits)
            edit(edits)

        method.edit = told
        return method  # type: ignore[no-any-return]

    monkeypatch.setitem(METHODS.items_by_name, name, made)
    return lambda: given


@pytest.mark.parametrize("name", ["ft-l", "grace"])
def test_a_method_goes_on_edit_by_edit_with_the_same_figures(
    place: Path, unbroken: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load_methods()
    run, whole = Bencher(place, name), unbroken(name, batch_size=2)
    with monkeypatch.context() as patch:
        breaking_at(patch, name, "4")
        with pytest.raises(BrokenOffError):
            run(batch_size=2)
    held = place / "out" / "work" / name
    assert (held / "state.safetensors").is_file()
    with monkeypatch.context() as patch:
        given = breaking_at(patch, name, "never")
        report = run(batch_size=2)
    assert run.notes == [f"{name} goes on after 4 edits"]
    assert given() == ["4"]
    require_same(report.rows, whole.rows)
    assert report.rows[1]["figures"]["seconds_per_edit"] > 0
    assert not held.exists()


def test_what_was_answered_is_not_asked_again(
    place: Path, unbroken: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = Bencher(place, "ft-l"), unbroken("ft-l", batch_size=2)
    run.breaks_off(monkeypatch, "wisecli.bench.runner.MethodSubject.overhead", batch_size=2)
    stages = {event.stage for event in run.told}
    assert {"answers", "unedited answers"} <= stages
    kept = sorted((place / "out" / "work").rglob("*.jsonl"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-3])
    report = run(batch_size=2)
    asked = [event.total for event in run.told if event.stage == "answers"]
    # Of 2 edits the one answer that was broken off; of 5 edits all: two prompts each, one of locality.
    assert max(asked[:1], default=0) == 1
    require_same(report.rows, whole.rows)


def test_a_method_without_a_state_begins_anew_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_methods()
    run, maker = Bencher(place, "ft-l"), METHODS["ft-l"]

    class Plain:
        """What the protocol asks for, and no more."""

        def __init__(self, bench: Bench) -> None:
            method = maker(bench)
            self.edit, self.applied = method.edit, method.applied
            self.rewritten_prompt, self.bytes = method.rewritten_prompt, method.bytes

    whole = run("all")
    monkeypatch.setitem(METHODS.items_by_name, "ft-l", Plain)
    with monkeypatch.context() as patch:
        breaking_at(patch, "ft-l", "4")
        with pytest.raises(BrokenOffError):
            run()
    given = breaking_at(monkeypatch, "ft-l", "never")
    report = run()
    assert run.notes == ["ft-l was broken off and begins anew"]
    assert given() == ["0", "1", "2", "3", "4"]
    require_same(report.rows, whole.rows)


def test_what_takes_all_at_once_keeps_what_it_has_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bencher(place, "memit-mass")
    whole = run("all")
    assert run.notes == []
    run.breaks_off(monkeypatch, "wisecli.bench.runner.MethodSubject")
    report = run()
    assert run.notes == ["memit-mass goes on after 2 edits"]
    require_same(report.rows, whole.rows)


def test_rows_that_are_asked_for_later_begin_at_the_same_ends(place: Path) -> None:
    run = Bencher(place, "grace")
    whole = run("all", counts="3,5", batch_size=4)
    run(counts="3", batch_size=4)
    later = run(counts="3,5", batch_size=4)
    require_same(later.rows, whole.rows)


def test_a_method_that_learnt_from_other_records_begins_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bencher(place, "knn")
    whole = run("all", counts="2,11", batch_size=2)
    run.breaks_off(monkeypatch, "wisecli.bench.runner.MethodSubject", counts="2", batch_size=2)
    # What no number of edits reaches is learnt from: 14 records before, 5 now.
    report = run(counts="2,11", batch_size=2)
    assert run.notes == ["knn was broken off and begins anew"]
    require_same(report.rows, whole.rows)


def test_our_own_way_goes_on_with_its_shards(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bencher(place, "wise")
    whole = run("all", counts="3")
    for target, stopped in (
        ("wisecli.commands.edit.writing.StagedShards.finish", broken_later(StagedShards.finish)),
        ("wisecli.bench.wise_methods.merge", broken_later(merge)),
        ("wisecli.bench.wise_methods.evaluate", broken),
    ):
        run.breaks_off(monkeypatch, target, stopped, counts="3")
        spent = json.loads((place / "out" / "work" / "wise" / "spent.json").read_text())
        assert spent["edits"] == 3
        assert spent["seconds"] > 0
        report = run(counts="3")
        assert "shards" not in {event.stage for event in run.told}
        assert run.notes == []
        assert report.rows[0]["figures"]["seconds_per_edit"] * 3 > spent["seconds"]
        require_same(report.rows, whole.rows)
        assert not (place / "out" / "work" / "wise").exists()
        shutil.rmtree(place / "out")


def test_what_is_learned_of_a_model_once_is_not_in_the_seconds_of_edits(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, given = Bencher(place, "wise"), list[int]()
    edit = wise_methods.edit

    def told(model: str, file: Path, *rest: Any, **named: Any) -> Any:
        given.append(len(file.read_text().splitlines()))
        return edit(model, file, *rest, **named)

    monkeypatch.setattr(wise_methods, "edit", told)
    run(counts="2,3")
    assert given == [1, 2, 3]
    assert sorted(path.name for path in (place / "out" / "work").iterdir()) == ["edits.jsonl", "memory", "unedited"]


def test_our_shards_of_another_number_are_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bencher(place, "wise")
    whole = run("all", counts="4")
    run.breaks_off(monkeypatch, "wisecli.bench.wise_methods.evaluate", counts="3")
    require_same(run(counts="4").rows, whole.rows)


def test_force_forgets_what_was_begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bencher(place, "ft-l")
    run.breaks_off(monkeypatch, "wisecli.bench.runner.MethodSubject")
    given = BenchSettings(methods="ft-l", counts="2", resamples=20, protocol="wild", seed=1)
    model, data = str(place / "model"), [place / "data.jsonl"]
    bench(model, place / "out", given, data=data, load=CPU, force=True, on_progress=run.told.append)
    assert run.notes == []


def test_answers_are_read_as_they_were_kept(tmp_path: Path) -> None:
    book = AnswerFolder(tmp_path / "answers")
    told = {"ba\nbe ü": Answer("bi\n", ended=True), "ka": Answer("", ended=False)}
    for text, answer in told.items():
        book[50, frozenset({3, 1})][text] = answer
    assert book[49, frozenset({3, 1})] == {}
    assert AnswerFolder(tmp_path / "answers")[50, frozenset({1, 3})] == told
    (file,) = (tmp_path / "answers").iterdir()
    with file.open("ab") as stream:
        stream.write(b'["broken o')
    assert AnswerFile(file) == told
    AnswerFile(file)["more"] = Answer("bu", ended=True)
    assert AnswerFile(file) == {**told, "more": Answer("bu", ended=True)}
