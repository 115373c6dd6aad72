"""The state of edited models in vLLM's second model runner, with vLLM's own classes: its interface and what it does."""

import json
from typing import Any

import pytest
from support.served import PROMPTS, in_engine, serving, tiny_export
from transformers import AutoTokenizer

pytestmark = serving


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tiny_export(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    prompts = [tokenizer(prompt).input_ids for prompt in (PROMPTS[0], PROMPTS[-1])]
    found: dict[str, Any] = json.loads(in_engine("second_runner.py", str(path), json.dumps(prompts)))
    return found | {"prompts": prompts}


def test_the_interface_is_vllms(told: dict[str, Any]) -> None:
    assert {"add_request", "prepare_inputs", "prepare_dummy_inputs"} <= set(told["parameters"])
    for name, (wanted, own) in told["parameters"].items():
        assert own == wanted, name


def test_what_an_edit_answers_is_changed_from_its_prompts_end_on(told: dict[str, Any]) -> None:
    assert told["unanswered"] == ["other"]
    end = len(told["prompts"][0]) - 1
    assert told["added"][0] == end
    assert set(told["added"]) <= {end, end + 1}  # the second is a token that the request has generated
    assert told["added to a trial run"] == []
    assert told["added to who has left"] == []
