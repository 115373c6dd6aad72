from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from support.loading import CPU
from support.quick_edits import edit_quickly
from support.studying import make_place, studied
from torch.nn import functional

from wisecli.bench.studies import latency
from wisecli.bench.studies.latency import steps, taking_turns
from wisecli.bench.study import StudyReport
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.routing.deciding.decision import AnswerTokens
from wisecli.routing.passes.routed_pass import PassRoute, in_pass
from wisecli.routing.passes.token_cache import cache_returned


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    place = make_place(tmp_path_factory.mktemp("turns"))
    with pytest.MonkeyPatch.context() as patch:
        edit_quickly(patch)
        return studied(place, place / "out", study="latency", edits_per_shard=2)


@pytest.fixture(scope="module")
def edited(report: StudyReport) -> EditedModel:
    return attach(report.output / "work" / "memory", load=CPU)


def test_figures_are_medians_of_what_was_taken_in_turns(
    report: StudyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = report.rows["latency"]
    assert [(row["shards"], row["mode"]) for row in rows] == [(3, mode) for mode in ("lookup", "retrieve", "merge")]
    assert all(value > 0 for row in rows for value in row["figures"].values())
    edit_quickly(monkeypatch)
    monkeypatch.setattr(latency, "taking_turns", lambda *_: ([0.003, 0.002, 0.016], [0.001, 0.002, 0.002]))
    again = studied(report.output.parent, tmp_path / "out", study="latency", counts="3")
    for row in again.rows["latency"]:
        for way in ("prefill", "decode"):
            assert row["figures"][f"{way}_ratio"] == pytest.approx(3)  # not 3 / 2, the ratio of the medians
            assert row["figures"][f"{way}_milliseconds"] == pytest.approx(3)
            assert row["figures"][f"{way}_base_milliseconds"] == pytest.approx(2)


def answers(edited: EditedModel) -> bool:
    """Whether a memory that answers a token is on."""
    routed = edited.routed
    keys, first = torch.randn(1, 1, routed.weight.shape[1]), torch.zeros(1, 1, dtype=torch.long)
    with in_pass(PassRoute(first, AnswerTokens(first, first))):
        return not torch.equal(routed(keys), functional.linear(keys, routed.weight, routed.bias))


def test_memory_and_base_take_turns(edited: EditedModel) -> None:
    states: list[bool] = []

    def step() -> Callable[[], object]:
        return lambda: states.append(answers(edited))

    taken, base = taking_turns(edited, step)
    assert len(taken) == len(base) == len(states) // 2 - 1
    assert states == [True, False] * (len(states) // 2)
    assert answers(edited)


def test_a_slower_memory_is_seen(edited: EditedModel) -> None:
    def step() -> Callable[[], object]:
        return lambda: sum(range(600_000 if answers(edited) else 20_000))

    taken, base = taking_turns(edited, step)
    assert median(mine / other for mine, other in zip(taken, base, strict=True)) > 1.5


@torch.no_grad()
def test_what_is_timed_is_a_prompt_and_the_token_after_it(edited: EditedModel) -> None:
    prompts = ["ba be bi bo", "ka"]
    made = steps(edited, prompts)
    whole = made["prefill"]()()
    assert whole.logits.shape[:2] == (2, 4)
    for _ in range(2):  # the cache is the same every time
        one = made["decode"]()()
        assert one.logits.shape[:2] == (2, 1)
        assert cache_returned(one).get_seq_length() == 5
