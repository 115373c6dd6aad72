import json
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


@pytest.mark.parametrize("threshold", ["nan", "inf", ".5,reliability=.9", "high"])
def test_a_gate_that_could_not_fail_is_refused(wise: Wise, ready: Ready, threshold: str) -> None:
    outcome = wise("eval", "--memory", ready.memory, "--no-generate", "--fail-under", f"reliability={threshold}")
    require_refusal(outcome, "--fail-under must look like reliability=.9,locality=.95, each figure once")


def test_a_gate_passes_over_what_no_record_measures(wise: Wise, ready: Ready) -> None:
    records = write_edits(Path("records.jsonl"), [{"prompt": "ba be bi", "target": "do du"}])
    common = ("eval", "--memory", ready.memory, "--no-generate", "--dataset", str(records), "--fail-under")
    require_refusal(wise(*common, "reliability=0,generalization=.9"), "generalization: not measured here")
    passed = wise(*common, "reliability=0,generalization=.9", "--if-measured")
    assert passed.code == 0
    assert "no record measures generalization" in passed.err
    require_refusal(wise(*common, "reliability=1.1,locality=1", "--if-measured"), "reliability is", code=1)
    require_refusal(wise(*common, "locality=.9", "--if-measured"), "not measured here")
    require_refusal(wise(*common, "reliability=0,charm=.9", "--if-measured"), "charm: there is no such figure")


def test_answers_in_forms_come_first_and_are_counted(wise: Wise, ready: Ready) -> None:
    outcome = wise("eval", "--memory", ready.memory, "--forms", "bare,behind-a-document", "--ask", "3")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    title = next(number for number, line in enumerate(lines) if "answers to 3 of 4 edits" in line)
    below = next(number for number, line in enumerate(lines) if "diagnosis, teacher-forced" in line)
    assert title < below
    heads = next(line for line in lines if "as taught" in line)
    assert all(head in heads for head in ("rephrased", "portability", "unrelated unchanged"))
    assert any("behind a document *" in line for line in lines[title:below])
    assert any("mean, never trained" in line for line in lines[title:below])
    assert "specificity leaves out 3 edits whose prompt names no subject" in outcome.out
    assert any("reliability" in line for line in lines[below:])
    assert "as taught" not in wise("eval", "--memory", ready.memory, "--forms", "none").out


def test_kinds_stand_in_two_tables_beside_the_forms(wise: Wise, ready: Ready) -> None:
    common = ("eval", "--memory", ready.memory, "--ask", "2")
    outcome = wise(*common, "--forms", "bare", "--kinds", "translate,capitals,two-hops")
    assert outcome.code == 0, outcome.err
    forms, asked, mentioned, below = (
        outcome.out.index(title)
        for title in ("answers to 2 of", "asked in other ways, 2", "only mentioned", "diagnosis")
    )
    assert forms < asked < mentioned < below
    assert "capitals" in outcome.out[asked:mentioned]
    assert "translate" in outcome.out[mentioned:below]
    report = json.loads(wise(*common, "--forms", "none", "--kinds", "translate,capitals", "--json").out)
    (figures,) = report["results"].values()
    assert {"asked", "asked/capitals", "mentioned", "mentioned/translate", "mentioned_unchanged"} < figures.keys()
    (better,) = report["higher_is_better"].values()
    assert (better["asked/capitals"], better["mentioned/translate"]) == (True, False)
    none = wise(*common, "--forms", "bare", "--kinds", "none").out
    assert "only mentioned" not in none and "asked in other ways" not in none


def test_thresholds_of_answers_in_forms(wise: Wise, ready: Ready) -> None:
    common = ("eval", "--memory", ready.memory, "--forms", "bare,no-question-mark", "--ask", "9", "--fail-under")
    failed = wise(*common, "as_taught/no-question-mark=1.01")
    require_refusal(failed, "gate failed", "as_taught/no-question-mark is", code=1)
    assert wise(*common, "as_taught=0,as_taught_trained=0,unrelated_unchanged=0,rephrased_unique=0").code == 0
    require_refusal(wise(*common, "as_taught/chat=0"), "as_taught/chat: not measured here", code=2)
    assert wise(*common, "as_taught=0,other_question=0", "--if-measured").code == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--forms", "loud"), ("'loud' is unknown", "known are all, trained, unseen, none, bare, question")),
        (("--forms", "bare,"), ("'' is unknown",)),
        (("--forms", "chat"), ("'chat' needs a chat template",)),
        (("--kinds", "loud"), ("'loud' is unknown", "known are all, asked, mentioned, none, translate")),
        (("--ask", "0"), ("ask must lie",)),
        (("--protocol", "tame"), ("protocol must be one of forms, wild, teacher, forms,wild, not 'tame'",)),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    wise: Wise, ready: Ready, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    require_refusal(wise("eval", "--memory", ready.memory, *flags), *says, code=2)


def test_wild_is_a_table_of_its_own(wise: Wise, ready: Ready) -> None:
    outcome = wise(
        "eval", "--memory", ready.memory, "--protocol", "wild", "--before", "--fail-under", "wild_locality=0"
    )
    assert outcome.code == 0, outcome.err
    assert "asked as in WILD (arXiv 2502.11177)" in outcome.out
    assert outcome.out.index("wild_as_taught") < outcome.out.index("reliability")
