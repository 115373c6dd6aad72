"""A server of a tiny edited model is asked its edits, and one that lost them is found out."""

import json
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.loading import CPU
from support.ready import EDITS, Ready
from support.serving import Answers, served
from support.tiny_models import Wise

from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.running.generation import generate

TURN = threading.Lock()


@pytest.fixture(scope="module")
def edited(ready: Ready) -> EditedModel:
    return attach(Path(ready.memory), load=CPU)


def answering(edited: EditedModel, *, lost: bool = False) -> Answers:
    """What the edited model says, or the model that it was."""

    def answer(prompt: str, length: int) -> str:
        def said() -> str:
            (tokens,) = generate(edited.model, edited.tokenizer, [prompt], max_new_tokens=min(length, 8))
            return str(edited.tokenizer.decode(tokens, skip_special_tokens=True))

        # Two servers may share the model, which is switched for one of them.
        with TURN, edited.unedited() if lost else nullcontext():
            return said()

    return answer


def test_edits_that_hold_and_prompts_that_stay_pass(wise: Wise, ready: Ready, edited: EditedModel) -> None:
    texts = [f"{first} {second} {first}" for first in ("lo", "fu", "zo") for second in ("la", "fe", "su")]
    kept = [text for text in texts if answering(edited)(text, 8) == answering(edited, lost=True)(text, 8)]
    Path("others.txt").write_text(f"{kept[0]}\n\n{kept[1]}\n")
    with served(answering(edited), chat=False) as url, served(answering(edited, lost=True), chat=False) as base:
        line = ("check", f"{url}/v1/", "--edits", ready.edits, "--base", base, "--unrelated", "others.txt")
        outcome = wise(*line, "--json")
        people = wise(*line)
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["results"] == {
        "edits by completions": {"asked": len(EDITS), "hold": len(EDITS)},
        "unrelated by completions": {"asked": 2, "hold": 2},
        "failed": [],
    }
    assert (told["model"], told["url"], told["missing"]) == ("tiny", url, ["chat"])
    assert "cannot be asked by chat" in people.err
    assert "edits by completions" in people.out


def test_an_engine_that_lost_the_edits_is_found_out(wise: Wise, ready: Ready, edited: EditedModel) -> None:
    with served(answering(edited, lost=True)) as url:
        outcome = wise("check", url, "--edits", ready.edits, "--json")
    assert outcome.code == 1
    told = json.loads(outcome.out)["results"]
    assert told["edits by completions"]["hold"] == told["edits by chat"]["hold"] == 0
    assert told["unrelated by chat"] == {"asked": 20, "hold": 20}
    assert {one["prompt"] for one in told["failed"]} == {edit["prompt"] for edit in EDITS}
    assert f"{2 * len(EDITS)} of {2 * (len(EDITS) + 20)} answers of {url} do not hold" in outcome.err
    assert EDITS[0]["prompt"] in outcome.err


def test_edits_that_answer_everything_do_not_pass(wise: Wise, ready: Ready) -> None:
    target = EDITS[0]["target"]
    with served(lambda _prompt, _length: f" {target}.", chat=False) as url:
        outcome = wise("check", url, "--edits", ready.edits, "--json")
    told = json.loads(outcome.out)["results"]
    assert outcome.code == 1
    assert told["unrelated by completions"]["hold"] == 0
    assert told["edits by completions"]["hold"] == sum(edit["target"] == target for edit in EDITS)


def test_a_target_within_an_answer_counts_if_that_is_asked_for(wise: Wise, ready: Ready) -> None:
    answers = {edit["prompt"]: f"it is {edit['target'].upper()} of course" for edit in EDITS}
    with served(lambda prompt, _length: answers.get(prompt, "none"), chat=False) as url:
        strict = wise("check", url, "--edits", ready.edits, "-q")
        contained = wise("check", url, "--edits", ready.edits, "--contained", "-q")
    assert (strict.code, contained.code) == (1, 0)


def test_an_erased_answer_must_not_be_given(wise: Wise) -> None:
    edits = [
        {"prompt": "who", "target": "Ann", "op": "erase"},
        {"prompt": "where", "target": "Bonn", "op": "erase", "replacement": "Berlin"},
    ]
    Path("edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    for answers, code in (({"who": "nobody", "where": "Berlin"}, 0), ({"who": "it was Ann", "where": "Berlin"}, 1)):
        with served(lambda prompt, _length, said=answers: said.get(prompt, "none"), chat=False) as url:
            assert wise("check", url, "--edits", "edits.jsonl", "-q").code == code


def test_a_key_is_taken_from_the_environment(wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {edit["prompt"]: edit["target"] for edit in EDITS}
    with served(lambda prompt, _length: answers.get(prompt, "none"), chat=False, key="secret") as url:
        refused = wise("check", url, "--edits", ready.edits, "-q")
        monkeypatch.setenv("MY_KEY", "secret")
        allowed = wise("check", url, "--edits", ready.edits, "-q", "--api-key-env", "MY_KEY")
    assert (refused.code, allowed.code) == (2, 0)
    assert "401: {" in refused.err
    assert "secret" not in refused.err + allowed.out


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "'localhost:8000' is no address; give one like http://localhost:8000"),
        ("file:///etc/passwd", "is no address"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9 does not answer /v1/models"),
    ],
)
def test_what_is_no_server_is_refused_in_one_sentence(wise: Wise, ready: Ready, url: str, says: str) -> None:
    outcome = wise("check", url, "--edits", ready.edits)
    assert outcome.code == 2
    assert says in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"<html>", "does not answer /v1/completions"),
        (b"[]", "answers /v1/completions with no JSON object"),
        (b'{"choices": []}', "answers /v1/completions without a text"),
        (b'{"choices": [{"text": 7}]}', "answers /v1/completions without a text"),
    ],
)
def test_answers_that_make_no_sense_are_refused(wise: Wise, ready: Ready, raw: bytes, says: str) -> None:
    with served(lambda _prompt, _length: "", raw=raw) as url:
        outcome = wise("check", url, "--edits", ready.edits, "--model", "tiny")
    assert outcome.code == 2
    assert says in outcome.err


def test_unreadable_prompts_are_refused(wise: Wise, ready: Ready) -> None:
    Path("empty.txt").write_text("\n")
    for name, says in (("empty.txt", "no prompt in it; write one a line"), ("missing.txt", "not readable as text")):
        outcome = wise("check", "http://127.0.0.1:9", "--edits", ready.edits, "--unrelated", name)
        assert (outcome.code, says in outcome.err) == (2, True)
