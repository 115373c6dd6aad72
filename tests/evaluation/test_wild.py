"""The WILD protocol, against its own rules spelt out by loops."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.evaluation import answer_of, edited_model, text_of
from support.helpers import random_rows, save_tiny, tiny_qwen2_tokenizer, tiny_tokenizer
from support.loading import CPU

from wisecli.commands.measure.evaluate import evaluate
from wisecli.config import EvalSettings
from wisecli.edits.record import Edit, EvaluationPrompt
from wisecli.evaluation.answers import Answer, Answers, Targets, answered
from wisecli.evaluation.metrics import is_figure
from wisecli.evaluation.wild import MAX_NEW_TOKENS, measure_wild, normalized, stop_tokens
from wisecli.models.loading import load_model

PROMPT = "Please answer the question:\n\nQ: {}\nA:"
LENGTH = 8


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Beatles.", "beatles"),
        (" a  Man,\tan apple ", "man apple"),
        ("U.S.A", "usa"),
        ("Theodore an-d Ana", "theodore and ana"),
        ("Élan, 'the'!", "élan"),
        ("The", ""),
        ("1,234.5", "12345"),
    ],
)
def test_answers_are_normalised_as_by_squad(text: str, wanted: str) -> None:
    assert normalized(text) == wanted


def test_tokens_with_a_full_stop_or_a_line_break_stop() -> None:
    tokenizer = tiny_qwen2_tokenizer()
    assert stop_tokens(tokenizer) == {tokenizer.convert_tokens_to_ids(".")}
    assert stop_tokens(tiny_tokenizer()) == frozenset()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_answer_goes_up_to_the_first_stop_and_holds_it(tmp_path: Path, batch_size: int) -> None:
    loaded = load_model(save_tiny(tmp_path / "model"), load=CPU)
    prompts = ["ba be", "ka", "ma me mi mo mu", "da do", "ga ge gi"]
    stops = frozenset(range(3, 97, 5))
    found: list[Answer] = []
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        found += answered(loaded.model, loaded.tokenizer, some, max_new_tokens=7, stops=stops)
    ends = []
    for prompt, answer in zip(prompts, found, strict=True):
        ids = loaded.tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 7 and not (new and new[-1] in stops):
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == 1:
                break
            new.append(token)
        assert answer.text == loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.ended == (len(new) < 7 or new[-1] in stops)
        ends.append(len(new))
    assert len(set(ends)) > 1


def test_all_edits_are_asked_once_and_the_unedited_model_only_if_that_is_wanted() -> None:
    edits = [
        Edit("a", "where", "the Fjord", rephrases=("in which place", "where then"), portability=(_probe("how far"),)),
        Edit("b", "who", "Ann", rephrases=("where then",), locality=(_probe("what"), _probe("why"))),
        Edit("c", "when", "never", op="erase"),
    ]
    said = {
        "where": " Fjord.",
        "in which place": "Fjord, Norway",
        "where then": "ANN",
        "how far": "Far",
        "who": "ann\n",
    }
    asked: list[str] = []

    def edited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
        asked.extend(texts)
        return [Answer(said.get(text[len(PROMPT) - 5 : -3], "same"), ended=True) for text in texts]

    def unedited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
        return [Answer("other" if "what" in text else "same", ended=True) for text in texts]

    answers = Answers(tiny_tokenizer(), unedited, edited, batch_size=2)
    found = measure_wild(answers, edits, edits, before=False)
    assert sorted(asked) == sorted(
        PROMPT.format(one) for one in ("where", "in which place", "where then", "how far", "who")
    )
    assert found.figures == {"wild_as_taught": 1.0, "wild_rephrased": 0.5, "wild_portability": 1.0}
    assert found.samples["wild_rephrased"] == 3
    full = measure_wild(answers, edits, edits, before=True)
    assert full.figures == {**found.figures, "wild_locality": 0.5}
    assert full.before == {"wild_as_taught": 0.0, "wild_rephrased": 0.0, "wild_portability": 0.0}
    assert len(asked) == len(set(asked))
    unique = measure_wild(answers, edits[:1], edits[:1], before=False)
    assert unique.figures["wild_rephrased_unique"] == unique.figures["wild_rephrased"] == 0.0
    assert all(map(is_figure, full.figures))


def _probe(prompt: str) -> EvaluationPrompt:
    return EvaluationPrompt(prompt, "far")


def test_wild_figures_are_those_of_a_loop_over_single_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_NEW_TOKENS == 50
    monkeypatch.setattr("wisecli.evaluation.protocols.MAX_NEW_TOKENS", LENGTH)
    edited = edited_model(tmp_path)
    records = []
    for number in range(4):
        prompts = [text_of(edited, row.prompt) for row in random_rows(*[(3 + number, 1)] * 2, seed=90 + number)]
        target = answer_of(edited, PROMPT.format(prompts[0]), LENGTH, end=1) if number % 2 else "da de"
        probes = (EvaluationPrompt(prompts[1], "da"),)
        records.append(Edit(str(number), prompts[0], target, rephrases=(prompts[1],), locality=probes))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in records))
    settings = EvalSettings(dataset=str(path), protocol="wild", before=True)
    report = evaluate(tmp_path / "memory", settings, load=CPU)
    assert report.asked["wild_as_taught"] == 0.5
    same = [
        answer_of(edited, PROMPT.format(record.rephrases[0]), LENGTH, end=1)
        == answer_of(edited, PROMPT.format(record.rephrases[0]), LENGTH, memory=False, end=1)
        for record in records
    ]
    assert report.asked["wild_locality"] == pytest.approx(statistics.fmean(same))
    assert "wild_as_taught" in report.before
    assert "reliability" in report.after
    assert "generated_exact" not in report.after
