from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rewriting import bench_for, words
from support.thorough import few
from torch import Tensor

from wisecli.bench import editing_run
from wisecli.bench.editing_run import EditingRun, MethodFolder, PortionProgress
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.adapters.defer import Defer, DeferSettings
from wisecli.bench.methods.adapters.grace import Grace, GraceSettings
from wisecli.bench.methods.adapters.lora import Lora, LoraSettings
from wisecli.bench.methods.adapters.lora_paraphrased import LoraParaphrased, LoraParaphrasedSettings
from wisecli.bench.methods.adapters.memoir import Memoir, MemoirSettings
from wisecli.bench.methods.base import METHODS, Bench, Gradual, Method, Resumable
from wisecli.bench.methods.context.retrieval import ReplayedMethod
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.bench.methods.weights.alphaedit import AlphaEdit, AlphaEditSettings
from wisecli.bench.methods.weights.crispedit import CrispEdit, CrispEditSettings
from wisecli.bench.methods.weights.ft_ewc import FtEwc
from wisecli.bench.methods.weights.ft_l import FtL, FtLSettings
from wisecli.bench.methods.weights.memit import SEARCH, Memit, MemitSettings
from wisecli.bench.methods.weights.mend import Mend, MendSettings
from wisecli.bench.methods.weights.rome import Rome
from wisecli.bench.methods.weights.ultraedit import UltraEdit, UltraEditSettings
from wisecli.bench.methods.weights.weight_editing import WeightEditing
from wisecli.edits.record import Edit, EvaluationPrompt
from wisecli.errors import WiseError
from wisecli.models.prompts.tokenization import encode
from wisecli.progress import Event, ignore_progress

load_methods()

QUICK = replace(SEARCH, steps=3)
LAYERS = MemitSettings(first=1, last=2, of=5, search=QUICK, prefixes=1, prefix_tokens=3)
# Made with few steps; the others as the table makes them.
MAKERS: dict[str, Any] = {
    "ft-l": lambda bench: FtL(bench, FtLSettings(steps=3)),
    "ft-ewc": lambda bench: FtEwc(bench, FtLSettings(steps=3)),
    "rome": lambda bench: Rome(bench, QUICK),
    "memit": lambda bench: Memit(bench, LAYERS, batch=1),
    "alphaedit": lambda bench: AlphaEdit(bench, LAYERS, AlphaEditSettings(threshold=0.5, weight=0.05), batch=2),
    "ultraedit": lambda bench: UltraEdit(bench, UltraEditSettings(first=1, last=2, of=5, batch=2)),
    "mend": lambda bench: Mend(bench, MendSettings(passes=1, fewest=2, rank=4)),
    "lora": lambda bench: Lora(bench, LoraSettings(steps=3)),
    "defer": lambda bench: Defer(bench, DeferSettings(steps=3)),
    "grace": lambda bench: Grace(bench, GraceSettings(steps=3)),
    "memoir": lambda bench: Memoir(bench, MemoirSettings(steps=3, prefixes=1, prefix_tokens=3)),
}
# These can be kept within a portion, too.
GRADUAL: dict[str, Any] = {
    "memit-mass": lambda bench: Memit(bench, LAYERS),
    "alphaedit": MAKERS["alphaedit"],
    "crispedit": lambda bench: CrispEdit(bench, CrispEditSettings(first=1, last=2, of=5, passes=4, batch=2)),
    "lora-paraphrased": lambda bench: LoraParaphrased(bench, LoraParaphrasedSettings(passes=2, batch=2, paraphrases=1)),
}
RESUMED = (*MAKERS, "knn", "icl", "rag", "rag-hybrid", "rag-shots", "serac")


class BrokenOffError(Exception):
    """As if the machine had been switched off."""


def breaking(method: Any, name: str) -> Any:
    """The method, which breaks off when it is given the portion in which an edit is."""
    given = "steps" if isinstance(method, Gradual) else "edit"
    edit = getattr(method, given)

    def broken(edits: Sequence[Edit]) -> Any:
        if name in [one.id for one in edits]:
            raise BrokenOffError
        return edit(edits)

    setattr(method, given, broken)
    return method


def breaking_after(method: Any, number: int) -> Any:
    """The method, which breaks off after a number of steps."""
    steps = method.steps

    def broken(edits: Sequence[Edit]) -> Iterator[None]:
        nonlocal number
        for _ in steps(edits):
            yield
            number -= 1
            if not number:
                raise BrokenOffError

    method.steps = broken
    return method


def counting(method: Any) -> tuple[Any, list[None]]:
    """The method, and a list that gets longer with its steps."""
    steps, made = method.steps, list[None]()
    method.steps = lambda edits: (made.append(step) for step in steps(edits))
    return method, made


def records(count: int, seed: int) -> list[Edit]:
    prompts, targets = words(*[5] * count, seed=seed), words(*[2] * count, seed=seed + 1)
    asked, apart = words(*[4] * count, seed=seed + 2), words(*[6] * count, seed=seed + 3)
    return [
        Edit(str(number), prompt, target, rephrases=(other,), locality=(EvaluationPrompt(beside, target),))
        for number, (prompt, target, other, beside) in enumerate(zip(prompts, targets, asked, apart, strict=True))
    ]


EDITS, TRAIN = records(7, 11), records(6, 21)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(editing_run, "_EVERY", 0.0)
    monkeypatch.setattr(ReplayedMethod, "portion", 2)
    return replace(bench_for(tmp_path / "model", "llama"), train=TRAIN, batch_size=2)


def made(name: str, bench: Bench) -> Any:
    return MAKERS.get(name, METHODS[name])(bench)


def begun(directory: Path) -> MethodFolder:
    place = MethodFolder(directory)
    place.begin()
    return place


def run_of(method: Method, place: MethodFolder, counts: Sequence[int] = (3, 7)) -> EditingRun:
    return EditingRun(method, EDITS, counts, place, PortionProgress(ignore_progress))


def answers(bench: Bench, method: Method) -> list[Tensor]:
    prompts = [text for edit in EDITS for text in (edit.prompt, *edit.rephrases)]
    rows = [encode(bench.loaded.tokenizer, method.rewritten_prompt(prompt), "ba") for prompt in prompts]
    return [one.losses for one in target_predictions(bench.loaded, rows, method, batch_size=4)]


@pytest.mark.parametrize("name", RESUMED)
def test_what_goes_on_ends_where_what_is_not_broken_off_ends(bench: Bench, tmp_path: Path, name: str) -> None:
    whole = made(name, bench)
    unbroken = run_of(whole, begun(tmp_path / "whole"))
    unbroken.edit_to(3)
    unbroken.edit_to(7)
    place = begun(tmp_path / "broken")
    first = run_of(breaking(made(name, bench), "6"), place)
    first.edit_to(3)
    with pytest.raises(BrokenOffError):
        first.edit_to(7)
    again = run_of(made(name, bench), place)
    assert again.take_up(7)
    portion = again.state.portion
    # The first segment ends at 3, and from there on whole portions were taken in.
    assert again.state.done == 3 + 3 // portion * portion
    assert again.state == replace(first.state, row=again.state.row, peaks=again.state.peaks)
    again.edit_to(7)
    assert again.state.seconds > first.state.seconds
    method = again.method
    assert isinstance(whole, Resumable)
    assert isinstance(method, Resumable)
    before, after = whole.state(), method.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(
        torch.equal(one, other) for one, other in zip(answers(bench, whole), answers(bench, method), strict=True)
    )
    assert method.bytes() == whole.bytes()


@pytest.mark.parametrize("after", few([1, 3], [3]))
@pytest.mark.parametrize("name", GRADUAL)
def test_what_breaks_off_within_a_portion_goes_on_there(bench: Bench, tmp_path: Path, name: str, after: int) -> None:
    whole, unbroken = counting(GRADUAL[name](bench))
    run_of(whole, begun(tmp_path / "whole"), (7,)).edit_to(7)
    place = begun(tmp_path / "broken")
    with pytest.raises(BrokenOffError):
        run_of(breaking_after(GRADUAL[name](bench), after), place, (7,)).edit_to(7)
    done = after // whole.portion * whole.portion if whole.portion else 0
    assert not run_of(GRADUAL[name](bench), place, (done + 1, 7)).take_up(7)
    method, left = counting(GRADUAL[name](bench))
    again = run_of(method, place, (7,))
    assert again.take_up(7)
    assert again.state.where == f"in the middle of edits {done + 1} to {done + (whole.portion or 7)}"
    again.edit_to(7)
    assert again.state.where == "after 7 edits"
    assert len(left) == len(unbroken) - after
    before, now = whole.state(), method.state()
    assert before.keys() == now.keys()
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_another_way_through_the_edits_begins_anew(bench: Bench, tmp_path: Path) -> None:
    place = begun(tmp_path / "place")
    run = run_of(made("alphaedit", bench), place, (3, 7))
    run.edit_to(3)
    assert run_of(made("alphaedit", bench), place, (3, 7)).take_up(3)
    for counts, most in (((7,), 7), ((2, 3, 7), 7), ((2, 3, 7), 2), ((3, 7), 2)):
        assert not run_of(made("alphaedit", bench), place, counts).take_up(most)
    assert not run_of(AlphaEdit(bench, LAYERS, AlphaEditSettings(0.5, 0.05), batch=3), place, (3, 7)).take_up(7)
    place.file.write_bytes(place.file.read_bytes()[:-1])
    assert not run_of(made("alphaedit", bench), place, (3, 7)).take_up(3)


def test_every_method_is_gone_on_with_here() -> None:
    assert {*RESUMED, *GRADUAL} == METHODS.keys()


def test_only_what_says_its_portion_goes_on(bench: Bench) -> None:
    assert isinstance(made("ft-l", bench), Resumable)
    assert not isinstance(WeightEditing(bench, [bench.site(1)]), Resumable)


def test_a_state_that_is_not_finite_leaves_the_one_before(bench: Bench, tmp_path: Path) -> None:
    place = begun(tmp_path / "place")
    method = made("ft-l", bench)
    run_of(method, place).edit_to(3)
    method.deltas[0] = method.deltas[0] / 0
    with pytest.raises(WiseError):
        run_of(method, place).edit_to(7)
    kept = place.kept()
    assert kept is not None
    assert kept[0].done == 3


def test_who_watches_is_told_of_all_edits(bench: Bench, tmp_path: Path) -> None:
    told: list[Event] = []
    watch = PortionProgress(told.append)
    place = begun(tmp_path / "place")
    run = EditingRun(FtL(replace(bench, on_progress=watch), FtLSettings(steps=1)), EDITS, (3, 7), place, watch)
    run.edit_to(3)
    run.edit_to(7)
    assert [(event.done, event.total) for event in told] == [(1, 3), (2, 3), (3, 3), (4, 7), (5, 7), (6, 7), (7, 7)]
