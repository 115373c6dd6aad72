import json

from support.tiny_models import Chain, Wise


def test_explained_answers_of_the_chain_name_who_answered(wise: Wise, chain: Chain) -> None:
    edit, base = chain.edits[0], ("How many days are there in a leap year", "--max-new-tokens", "4")
    told = wise("generate", str(chain.exported), edit["prompt"], "--json", "--explain")
    (answer,) = json.loads(told.out)["results"]
    assert answer["answer"] == edit["target"]
    assert answer["steps"]
    assert {step["memory"] for step in answer["steps"]} == {0}
    assert {step["edit"] for step in answer["steps"]} == {edit["prompt"]}
    assert all(step["score"] > step["threshold"] for step in answer["steps"])
    assert "".join(step["token"] for step in answer["steps"]).strip() == edit["target"]
    other = wise("generate", str(chain.model), *base, "--memory", str(chain.memory), "--explain")
    assert "main memory" in other.out
    assert "side memory" not in other.out


def test_plain_answers_of_the_chain_are_the_answers_alone(wise: Wise, chain: Chain) -> None:
    one, two = chain.edits[:2]
    assert wise("generate", str(chain.exported), one["prompt"]).out == f"{one['target']}\n"
    expected = "".join(f"{edit['prompt']} → {edit['target']}\n" for edit in (one, two))
    assert wise("generate", str(chain.exported), one["prompt"], two["prompt"]).out == expected
