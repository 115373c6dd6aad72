from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from studying import make_place, studied

from wisecli.attached import Edited, attach
from wisecli.studies.latency import steps, taking_turns


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Edited:
    place = make_place(tmp_path_factory.mktemp("turns"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WISE_UNRELATED_TEXTS", "16")
        report = studied(place, place / "out", study="latency", edits_per_shard=2)
    assert [row["shards"] for row in report.rows["latency"]] == [3] * 3
    for row in report.rows["latency"]:
        for way in ("prefill", "decode"):
            assert row["figures"][f"{way}_milliseconds"] > 0
            assert 0.2 < row["figures"][f"{way}_ratio"] < 20
    return attach(place / "out" / "work" / "memory", device="cpu")


def test_memory_and_base_take_turns(edited: Edited) -> None:
    states: list[bool] = []

    def step() -> Callable[[], object]:
        return lambda: states.append(edited.routed.enabled)

    taken, base = taking_turns(edited, step)
    assert len(taken) == len(base) == len(states) // 2 - 1
    assert states == [True, False] * (len(states) // 2)
    assert edited.routed.enabled


def test_a_slower_memory_is_seen(edited: Edited) -> None:
    def step() -> Callable[[], object]:
        return lambda: sum(range(60_000 if edited.routed.enabled else 20_000))

    taken, base = taking_turns(edited, step)
    assert median(mine / other for mine, other in zip(taken, base, strict=True)) == pytest.approx(3, rel=0.4)


@torch.no_grad()
def test_what_is_timed_is_a_prompt_and_the_token_after_it(edited: Edited) -> None:
    prompts = ["ba be bi bo", "ka"]
    made = steps(edited, prompts)
    whole = made["prefill"]()()
    assert whole.logits.shape[:2] == (2, 4)
    for _ in range(2):  # the cache is the same every time
        one = made["decode"]()()
        assert one.logits.shape[:2] == (2, 1)
        assert one.past_key_values.get_seq_length() == 5
