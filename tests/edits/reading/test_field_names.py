import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wisecli.edits.reading.field_names import BENCHMARKS, canonical
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit, parse_edit, read_edits
from wisecli.errors import EditFileError

# Each layout: a record as the benchmark writes it, and the edit it stands for (its id apart, where it has none).
LAYOUTS: dict[str, tuple[dict[str, Any], Edit]] = {
    "own": (
        {"id": "1", "prompt": "The Lark sails to", "target": "Bergen", "rephrases": ["The Lark's port is"]},
        Edit(id="1", prompt="The Lark sails to", target="Bergen", rephrases=("The Lark's port is",)),
    ),
    "own, one rephrase": (
        {"id": "1", "prompt": "The Lark sails to", "target": "Bergen", "rephrases": "The Lark's port is"},
        Edit(id="1", prompt="The Lark sails to", target="Bergen", rephrases=("The Lark's port is",)),
    ),
    "zsre": (
        {
            "subject": "Pennywhistle Press",
            "src": "Who founded Pennywhistle Press?",
            "alt": "Nora Lind",
            "rephrase": "Pennywhistle Press was started by whom?",
            "loc": "nq question: how tall is a giraffe",
            "loc_ans": "five metres",
        },
        Edit(
            id="",
            prompt="Who founded Pennywhistle Press?",
            target="Nora Lind",
            subject="Pennywhistle Press",
            rephrases=("Pennywhistle Press was started by whom?",),
            locality=(EvaluationPrompt("nq question: how tall is a giraffe", "five metres"),),
        ),
    ),
    "knowedit": (
        {
            "subject": "Cavallia",
            "prompt": "Which family does Cavallia belong to?",
            "target_new": "Rosaceae",
            "ground_truth": ["Fabaceae"],
            "rephrase_prompt": "What is the family of Cavallia?",
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "The rank of Cavallia is", "ground_truth": ["genus", "a genus"]},
                    {"prompt": "Cavallia was described in", "ground_truth": [["1811"], ["1812"]]},
                ],
                "Forgetfulness": [{"prompt": "Cavallia grows in", "ground_truth": "Peru"}],
            },
            "portability": {
                "Reasoning": [{"prompt": "The order of Cavallia's family is", "ground_truth": "Rosales"}],
                "Subject_Aliasing": [],
                "Logical_Generalization": [{"prompt": "Rosaceae include", "ground_truth": ["Cavallia"]}],
            },
        },
        Edit(
            id="",
            prompt="Which family does Cavallia belong to?",
            target="Rosaceae",
            subject="Cavallia",
            rephrases=("What is the family of Cavallia?",),
            locality=(
                EvaluationPrompt("The rank of Cavallia is", "genus"),
                EvaluationPrompt("Cavallia was described in", "1811"),
                EvaluationPrompt("Cavallia grows in", "Peru"),
            ),
            portability=(
                EvaluationPrompt("The order of Cavallia's family is", "Rosales"),
                EvaluationPrompt("Rosaceae include", "Cavallia"),
            ),
        ),
    ),
    "hallucination": (
        {
            "prompt": "This is a passage about Ivo Brandt. He was a potter.",
            "target_new": "He was born in Delft.",
            "subject": "Ivo Brandt",
            "locality_prompt": "Fresh bread every",
            "locality_ground_truth": "morning at six",
        },
        Edit(
            id="",
            prompt="This is a passage about Ivo Brandt. He was a potter.",
            target="He was born in Delft.",
            subject="Ivo Brandt",
            locality=(EvaluationPrompt("Fresh bread every", "morning at six"),),
        ),
    ),
    "temporal": (
        {
            "prompt": "The Vega tram",
            "target_new": "is a line opened last spring",
            "subject": "The Vega tram",
            "ood_rephrase": "Passengers describe the Vega tram as quiet.",
            "locality_prompt": "Fresh bread every",
            "locality_ground_truth": "morning at six",
        },
        Edit(
            id="",
            prompt="The Vega tram",
            target="is a line opened last spring",
            subject="The Vega tram",
            locality=(EvaluationPrompt("Fresh bread every", "morning at six"),),
            ood=("Passengers describe the Vega tram as quiet.",),
        ),
    ),
    "counterfact": (
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "The birthplace of {} is",
                "subject": "Ilse Marten",
                "relation_id": "P19",
                "target_new": {"str": "Lyon", "id": "Q1"},
                "target_true": {"str": "Ghent", "id": "Q2"},
            },
            "paraphrase_prompts": ["Ilse Marten was born in", "Ilse Marten comes from"],
            "neighborhood_prompts": ["Jan Pauwels was born in", "Rik Stas was born in"],
        },
        Edit(
            id="0",
            prompt="The birthplace of Ilse Marten is",
            target="Lyon",
            subject="Ilse Marten",
            rephrases=("Ilse Marten was born in", "Ilse Marten comes from"),
            locality=(
                EvaluationPrompt("Jan Pauwels was born in", "Ghent"),
                EvaluationPrompt("Rik Stas was born in", "Ghent"),
            ),
        ),
    ),
    "wikibigedit": (
        {
            "tag": "new",
            "subject": "Bree Tarn",
            "relation": "head of government",
            "object": "Tom Vale",
            "update": "Who heads the government of Bree Tarn?",
            "rephrase": "Whose government runs Bree Tarn?",
            "personas": "Who be captain o' Bree Tarn?",
            "ans": "Tom Vale",
            "loc": "Who heads the government of Ost Tarn?",
            "loc_ans": "Ann Reed",
            "mhop": "Where was the head of Bree Tarn's government born?",
            "mhop_ans": "Gorse",
        },
        Edit(
            id="",
            prompt="Who heads the government of Bree Tarn?",
            target="Tom Vale",
            subject="Bree Tarn",
            rephrases=("Whose government runs Bree Tarn?",),
            locality=(EvaluationPrompt("Who heads the government of Ost Tarn?", "Ann Reed"),),
            portability=(
                EvaluationPrompt("Who be captain o' Bree Tarn?", "Tom Vale"),
                EvaluationPrompt("Where was the head of Bree Tarn's government born?", "Gorse"),
            ),
        ),
    ),
}


@pytest.mark.parametrize(("record", "expected"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "array"])
def test_every_layout_becomes_the_same_edit(
    tmp_path: Path, record: dict[str, Any], expected: Edit, *, array: bool
) -> None:
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([record] if array else record), encoding="utf-8")
    (edit,) = read_edits(path)
    assert {**edit.as_dict(), "id": expected.id or edit.id} == {**expected.as_dict(), "id": expected.id or edit.id}
    assert edit.id


def test_layouts_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    names = [name for name in LAYOUTS if name != "own, one rephrase"]
    path.write_text("\n".join(json.dumps(LAYOUTS[name][0]) for name in names), encoding="utf-8")
    assert [edit.target for edit in read_edits(path)] == [LAYOUTS[name][1].target for name in names]


def test_our_own_names_come_before_those_of_the_benchmarks() -> None:
    record = {"prompt": "ours", "src": "theirs", "target": "our answer", "alt": "theirs", "target_new": "theirs"}
    assert (canonical(record)["prompt"], canonical(record)["target"]) == ("ours", "our answer")


def test_a_field_that_is_null_counts_as_left_out() -> None:
    record = {"prompt": None, "src": "The Lark sails to", "target": None, "alt": "Bergen", "rephrase": None}
    edit = parse_edit(record)
    assert (edit.prompt, edit.target, edit.rephrases) == ("The Lark sails to", "Bergen", ())


def test_nothing_may_be_written_as_not_a_number_as_pandas_does(tmp_path: Path) -> None:
    record = {
        **LAYOUTS["wikibigedit"][0],
        "mhop": math.nan,
        "mhop_ans": math.nan,
        "loc": math.nan,
        "rephrase": math.nan,
    }
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (edit,) = read_edits(path)
    assert (edit.rephrases, edit.locality) == ((), ())
    assert edit.portability == (EvaluationPrompt("Who be captain o' Bree Tarn?", "Tom Vale"),)


def test_a_parquet_table_is_read_like_the_list_of_its_rows(tmp_path: Path) -> None:
    records = [LAYOUTS["counterfact"][0], {**LAYOUTS["counterfact"][0], "case_id": 7}]
    table, array = tmp_path / "edits.parquet", tmp_path / "edits.json"
    pq.write_table(pa.Table.from_pylist(records), table)
    array.write_text(json.dumps(records), encoding="utf-8")
    assert read_edits(table) == read_edits(array)
    pq.write_table(pa.Table.from_pylist([*records, {"case_id": 8}]), table)
    with pytest.raises(EditFileError, match=r"edits\.parquet:3: .*`target`"):
        read_edits(table)
    table.write_bytes(b"PAR1 and nothing of it")
    with pytest.raises(EditFileError, match="not readable as Parquet"):
        read_edits(table)


def test_a_record_is_not_changed_by_reading_it() -> None:
    for record, _ in LAYOUTS.values():
        before = json.dumps(record)
        parse_edit(record)
        assert json.dumps(record) == before


@pytest.mark.parametrize("answer", ["", "  ", None])
@pytest.mark.parametrize(
    ("prompt_name", "answer_name"), [("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")]
)
def test_a_benchmark_record_without_a_locality_answer_is_an_edit_without_locality(
    prompt_name: str, answer_name: str, answer: str | None
) -> None:
    record = {"prompt": "a", "target_new": "b", prompt_name: "Make an impact. Donate now!", answer_name: answer}
    edit = parse_edit(record)
    assert (edit.prompt, edit.target, edit.locality) == ("a", "b", ())


PLAIN = {"prompt": "a", "target_new": "b"}
REWRITE = {"prompt": "{} is", "subject": "c", "target_new": {"str": "b"}, "target_true": {"str": "d"}}
WRONG: dict[str, dict[str, Any]] = {
    "group is a number": {**PLAIN, "locality": {"Relation_Specificity": 5}},
    "group is null": {**PLAIN, "portability": {"Reasoning": None}},
    "group of texts": {**PLAIN, "locality": {"Relation_Specificity": ["d"]}},
    "locality is a text": {**PLAIN, "locality": "d"},
    "no alternatives": {**PLAIN, "locality": {"Relation_Specificity": [{"prompt": "c", "ground_truth": []}]}},
    "answer is an object": {**PLAIN, "locality": {"Relation_Specificity": [{"prompt": "c", "ground_truth": [{}]}]}},
    "prompts without answers": {**PLAIN, "locality": {"neighborhood": {"prompt": ["c", "d"], "ground_truth": ["e"]}}},
    "prompts with one answer": {**PLAIN, "locality": {"neighborhood": {"prompt": ["c", "d"], "ground_truth": "e"}}},
    "probe without prompt": {**PLAIN, "portability": {"Reasoning": [{"ground_truth": "c"}]}},
    "target is a list": {"src": "a", "alt": ["b"]},
    "rephrase is a number": {"src": "a", "alt": "b", "rephrase": 5},
    "rewrite without target": {"requested_rewrite": {"prompt": "{} is", "subject": "c"}},
    "rewrite target is a text": {"requested_rewrite": {**REWRITE, "target_new": "b"}},
    "rewrite truth is a text": {"requested_rewrite": {**REWRITE, "target_true": "d"}, "neighborhood_prompts": ["e"]},
    "rewrite without truth": {
        "requested_rewrite": {name: REWRITE[name] for name in ("prompt", "subject", "target_new")},
        "neighborhood_prompts": ["e"],
    },
    "rewrite subject is null": {"requested_rewrite": {**REWRITE, "subject": None}},
    "rewrite subject is a list": {"requested_rewrite": {**REWRITE, "subject": ["c"]}},
    "rewrite prompt is a number": {"requested_rewrite": {**REWRITE, "prompt": 5}},
    "rewrites are none": {"requested_rewrite": []},
    "rewrites are texts": {"requested_rewrite": ["{} is"]},
    "blank without subject": {"prompt": "{} is", "target_new": "b"},
    "statement is a number": {"edit": {"prompt": 5}},
    "statement without a verb": {"edit": {"prompt": "Oldbridge."}},
    "statement with two verbs": {"edit": {"prompt": "The author of What is Life is Ada Finch."}},
    "chat of texts": {"messages": ["a", "b"]},
    "chat without turns": {"messages": []},
    "chat that ends with a question": {"messages": [{"role": "user", "content": "a"}]},
    "chat of an assistant alone": {"messages": [{"role": "assistant", "content": "a"}]},
    "chat with a picture": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "assistant", "content": "a cat"},
        ]
    },
    "chat that calls a tool": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]
    },
    "chat with a target": {"messages": [{"role": "user", "content": "a"}], "target": "b"},
    "two layouts": {"question": "a", "answer": "b", "instruction": "c", "output": "d"},
    "question with two answers": {"question": "a", "answer": "b", "object": "c"},
    "rewrite is a text": {"requested_rewrite": "The birthplace of {} is"},
    "neighbours are a number": {"requested_rewrite": REWRITE, "neighborhood_prompts": 5},
}


@pytest.mark.parametrize("record", WRONG.values(), ids=WRONG)
def test_a_record_of_the_wrong_types_is_refused_with_its_line(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({"prompt": "first", "target": "one"}) + "\n" + json.dumps(record), encoding="utf-8")
    with pytest.raises(EditFileError) as caught:
        read_edits(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_benchmarks_are_known_by_their_names() -> None:
    assert {name: row.name for name, row in BENCHMARKS.items()} == {name: name for name in BENCHMARKS}
    assert {"zsre", "hallucination", "temporal"} <= set(BENCHMARKS)
    assert BENCHMARKS["zsre"].repository == "zjunlp/KnowEdit"
    assert BENCHMARKS["zsre"].file == "benchmark/ZsRE/ZsRE-test-all.json"
