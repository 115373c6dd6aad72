from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ready import Ready, here, require_refusal, write_edits
from support.tiny_models import Wise


def test_an_interruption_while_measuring_says_so_and_exits_with_130(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", interrupted)
    outcome = wise("eval", "--memory", ready.memory)
    assert (outcome.code, outcome.out) == (130, "")
    assert here() == []
    require_refusal(outcome, "interrupted", code=130)


def test_a_gate_that_fails_exits_with_1_and_one_that_holds_with_0(wise: Wise, ready: Ready) -> None:
    common = ("eval", "--memory", ready.memory, "--no-generate", "--fail-under")
    failed = wise(*common, "reliability=1.01")
    require_refusal(failed, "gate failed", "reliability is", code=1)
    assert "reliability" in failed.out
    assert wise(*common, "reliability=0,locality=0").code == 0


def test_a_gate_passes_over_what_no_record_measures(wise: Wise, ready: Ready) -> None:
    records = write_edits(Path("records.jsonl"), [{"prompt": "ba be bi", "target": "do du"}])
    common = ("eval", "--memory", ready.memory, "--no-generate", "--dataset", str(records), "--fail-under")
    require_refusal(wise(*common, "reliability=0,generalization=.9"), "generalization: not measured here")
    passed = wise(*common, "reliability=0,generalization=.9", "--if-measured")
    assert passed.code == 0
    assert "no record measures generalization" in passed.err
    require_refusal(wise(*common, "reliability=1.1,locality=1", "--if-measured"), "reliability is", code=1)
    require_refusal(wise(*common, "locality=.9", "--if-measured"), "not measured here")
    require_refusal(wise(*common, "reliability=0,charm=.9", "--if-measured"), "charm: not measured here")
