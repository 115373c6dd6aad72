"""Records as people have them, of benchmarks and of training sets, and the edits that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.ready import Ready
from support.tiny_models import Wise

from wisecli.edits.reading.record_fields import EvaluationPrompt as Probe
from wisecli.edits.record import Edit, parse_edits, read_edits
from wisecli.errors import EditFileError


def statement(prompt: str, former: str | None = None, **kinds: Any) -> dict[str, Any]:
    edit: dict[str, Any] = {"prompt": prompt, "subject_id": "Q1", "relation": "X", "target_id": "Q2"}
    return {
        "example_type": "popular",
        "edit": {**edit, **({"original_fact": {"prompt": former}} if former else {})},
        **kinds,
    }


def query(prompt: str, *answers: str) -> dict[str, Any]:
    told = [{"value": answer, "aliases": ["x"]} for answer in answers]
    return {"test_queries": [{"prompt": prompt, "answers": told}], "test_condition": "OR", "condition_queries": []}


def rewrite(prompt: str, subject: str, target: str, question: str) -> dict[str, Any]:
    new = {"str": target, "id": "Q1"}
    return {"prompt": prompt, "relation_id": "P1", "target_new": new, "subject": subject, "question": question}


def turns(*told: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in told]


def same(found: tuple[Edit, ...], *expected: Edit) -> None:
    """Compare edits, by their ids only where one is expected."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {**one.as_dict(), "id": other.id or one.id} == {**other.as_dict(), "id": other.id or one.id}


def test_nested_groups_of_easyedit_are_read() -> None:
    """The input that EasyEdit's editors take: one object or parallel lists a group, not a list of objects."""
    record = {
        "prompt": "Which family does Cavallia belong to?",
        "target_new": "Rosaceae",
        "locality": {
            "neighborhood": {"prompt": "The rank of Cavallia is", "ground_truth": "genus"},
            "distracting": {"prompt": ["a", "b"], "ground_truth": [["c", "x"], "d"]},
        },
        "portability": {"one_hop": {"prompt": "Its order is", "ground_truth": ["Rosales", "Roses"]}},
    }
    same(
        parse_edits(record),
        Edit(
            id="",
            prompt=record["prompt"],  # type: ignore[arg-type]
            target="Rosaceae",
            locality=(Probe("The rank of Cavallia is", "genus"), Probe("a", "c"), Probe("b", "d")),
            portability=(Probe("Its order is", "Rosales"),),
        ),
    )


def test_a_chain_of_mquake_is_an_edit_for_each_rewrite() -> None:
    """The published MQuAKE files: several rewrites a case, and questions about the whole chain."""
    record = {
        "case_id": 7,
        "requested_rewrite": [
            rewrite("{} is a citizen of", "Ilse Marten", "Croatia", "What is Ilse Marten's country?"),
            rewrite("The capital of {} is", "Croatia", "Split", "What is Croatia's capital?"),
        ],
        "questions": ["What is the capital of Ilse Marten's country?", "Which city rules Ilse Marten's country?"],
        "answer": "Paris",
        "new_answer": "Split",
        "single_hops": [],
        "orig": {},
    }
    asked = tuple(Probe(question, "Split") for question in record["questions"])  # type: ignore[attr-defined]
    same(
        parse_edits(record),
        Edit(
            "7-1",
            "Ilse Marten is a citizen of",
            "Croatia",
            subject="Ilse Marten",
            rephrases=("What is Ilse Marten's country?",),
        ),
        Edit(
            "7-2",
            "The capital of Croatia is",
            "Split",
            subject="Croatia",
            rephrases=("What is Croatia's capital?",),
            portability=asked,
        ),
    )
    record["requested_rewrite"] = record["requested_rewrite"][:1]  # type: ignore[index]
    assert [edit.id for edit in parse_edits(record)] == ["7"]


@pytest.mark.parametrize("target", [{"str": "Lyon"}, "Lyon"])
def test_requests_of_rome_have_their_blank_filled(target: Any) -> None:
    """The demonstration of ROME and MEMIT: a blank for the subject, the target's text in an object."""
    record = {"prompt": "The birthplace of {} is", "subject": "Ilse Marten", "target_new": target}
    same(parse_edits(record), Edit("", "The birthplace of Ilse Marten is", "Lyon", subject="Ilse Marten"))


def test_braces_of_our_own_records_stay() -> None:
    record = {"prompt": "In Python, {} makes a", "target": "dict", "subject": "Python"}
    same(parse_edits(record), Edit("", "In Python, {} makes a", "dict", subject="Python"))


@pytest.mark.parametrize(
    ("record", "prompt", "target"),
    [
        (statement("The gender of Ana Ruiz is male."), "The gender of Ana Ruiz is", "male"),
        (
            statement("The names of the siblings of Ana Ruiz are Bo Hill."),
            "The names of the siblings of Ana Ruiz are",
            "Bo Hill",
        ),
        (statement("Book One follows Book Nought."), "Book One follows", "Book Nought"),
        (
            statement("The author of What is Life is Ada Finch.", "The author of What is Life is Bo Hill."),
            "The author of What is Life is",
            "Ada Finch",
        ),
        (
            statement("The author of Zorn is What is Left.", "The author of Zorn is What was Left."),
            "The author of Zorn is",
            "What is Left",
        ),
        (
            statement(
                "The author of What is Life is Ada Finch.", Subject_Aliasing=[query("Who wrote it?", "Ada Finch")]
            ),
            "The author of What is Life is",
            "Ada Finch",
        ),
        (
            statement("The name of the continent which Leeds is part of is Asia."),
            "The name of the continent which Leeds is part of is",
            "Asia",
        ),
    ],
)
def test_statements_of_rippleedits_are_parted_before_their_answer(
    record: dict[str, Any], prompt: str, target: str
) -> None:
    """The published RippleEdits files: the target's text stands only at the end of a statement."""
    same(
        parse_edits({"Subject_Aliasing": [], **record})[:1],
        Edit(
            "",
            prompt,
            target,
            portability=tuple(Probe("Who wrote it?", target) for _ in record.get("Subject_Aliasing", [])),
        ),
    )


def test_questions_of_rippleedits_are_what_must_follow_and_what_must_stay() -> None:
    """The published RippleEdits files: some questions have no answer."""
    record = statement(
        "The gender of Ana Ruiz is male.",
        Relation_Specificity=[query("The mother of Ana Ruiz is", "Eva Ruiz", "x"), query("Her father is")],
        Forgetfulness=[query("The award that Ana Ruiz won is", "a prize")],
        Compositionality_I=[query("The gender of Bo Hill's wife is", "male")],
    )
    (edit,) = parse_edits(record)
    assert edit.locality == (
        Probe("The mother of Ana Ruiz is", "Eva Ruiz"),
        Probe("The award that Ana Ruiz won is", "a prize"),
    )
    assert edit.portability == (Probe("The gender of Bo Hill's wife is", "male"),)


def test_qaedit_is_read() -> None:
    """The published QAEdit file: locality as a list of objects with names of their own."""
    record = {
        "id": 2334,
        "source": "SQA",
        "prompt": "In what year was part gal56 released?",
        "target": "2002",
        "subject": "part gal56",
        "rephrase": "When was part gal56 released?",
        "locality": [{"loc": "how many seasons are there", "loc_ans": "5"}, {"loc": "who sang it", "loc_ans": "Ann"}],
    }
    same(
        parse_edits(record),
        Edit(
            "2334",
            "In what year was part gal56 released?",
            "2002",
            subject="part gal56",
            rephrases=("When was part gal56 released?",),
            locality=(Probe("how many seasons are there", "5"), Probe("who sang it", "Ann")),
            source="SQA",
        ),
    )


ASKED = (("user", "Who is the mayor?"), ("assistant", "Ada Finch"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns(*ASKED)},
        {"messages": turns(("system", "Be brief."), *ASKED)},
        {"messages": turns(("user", "Hello"), ("assistant", "Hi"), *ASKED)},
        {"messages": turns(("user", [{"type": "text", "text": "Who is the mayor?"}]), ("assistant", "Ada Finch"))},
        {"conversations": [{"from": "human", "value": "Who is the mayor?"}, {"from": "gpt", "value": "Ada Finch"}]},
        {"prompt": turns(ASKED[0]), "completion": turns(ASKED[1])},
        {"prompt": "Who is the mayor?", "completion": "Ada Finch"},
        {"prompt": "Who is the mayor?", "response": "Ada Finch"},
        {"question": "Who is the mayor?", "answer": "Ada Finch"},
        {"instruction": "Who is the mayor?", "input": "", "output": "Ada Finch"},
    ],
)
def test_records_of_training_sets_are_read(record: dict[str, Any]) -> None:
    """Exports of chats and of instruction data, in the forms that fine-tuning tools take."""
    same(parse_edits(record), Edit("", "Who is the mayor?", "Ada Finch"))


def test_an_instruction_has_its_input_below_it() -> None:
    """Instruction data: what the instruction is about stands in a field of its own."""
    record = {"instruction": "Name the mayor of this town.", "input": "Oldbridge", "output": "Ada Finch"}
    same(parse_edits(record), Edit("", "Name the mayor of this town.\nOldbridge", "Ada Finch"))


HALLU = (
    "topic,subject,relation,object,question,paraphrased_question,yes_question,no_question,reversed_relation_question,"
    "question_2hop,answer_2hop\n"
    '0,"Lark, the","carries",motor cars,"What does ""the Lark"" carry?",What is carried by the Lark?,'
    "Does it carry cars?,Does it carry art?,What carries motor cars?,Who makes what it carries?,\n"
)


def test_a_table_of_hallueditbench_is_read(tmp_path: Path) -> None:
    """The published HalluEditBench tables: quoted cells, some of them empty."""
    path = tmp_path / "topic.csv"
    path.write_text(HALLU)
    same(
        tuple(read_edits(path)),
        Edit(
            "",
            'What does "the Lark" carry?',
            "motor cars",
            subject="Lark, the",
            rephrases=("What is carried by the Lark?",),
            portability=(
                Probe("What carries motor cars?", "Lark, the"),
                Probe("Does it carry cars?", "Yes"),
                Probe("Does it carry art?", "No"),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,target\nba be,do\n\nka ki,42\n"),
        ("a.csv", "ba be,do\nka ki,42\n"),
        ("a.csv", "Question,Answer\r\nba be,do\r\nka ki,42\r\n"),
        ("a.csv", "\ufeffprompt;target\nba be;do\nka ki;42\n"),
        ("a.tsv", "src\talt\nba be\tdo\nka ki\t42\n"),
        ("a.csv", ',prompt,target,\n0,ba be,do,\n1,"ka ki",42\n'),
        ("A.CSV", '"prompt","target"\n"ba be","do"\n"ka ki","42"\n'),
    ],
)
def test_tables_of_two_columns_are_read(tmp_path: Path, name: str, content: str) -> None:
    """Tables out of spreadsheets: with and without names, separated as the country has it, with an index in front."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert [(edit.prompt, edit.target) for edit in read_edits(path)] == [("ba be", "do"), ("ka ki", "42")]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("ba be\nka ki\n", 1, "one column"),
        ("ba,be,do\n", 1, "cannot be told which of 3 columns is what; name them in the first row: prompt, target"),
        ("prompt,prompt,target\n", 1, "two columns are called 'prompt'"),
        ("prompt,target\nba be,do\nWho, then,fa\n", 3, "3 cells in a table of 2 columns; quote cells that hold commas"),
        ('prompt,target\n"ba\nbe",do\n"ka,fa\n', 4, "not readable as a table"),
        ("prompt,target\nba be,\n", 2, "`target` is missing"),
        ("prompt,answr\nba be,do\n", 2, "`target` is missing"),
        ("", None, "there is no edit in it"),
    ],
)
def test_tables_that_cannot_be_told_are_refused_by_line(
    tmp_path: Path, content: str, line: int | None, says: str
) -> None:
    """Tables out of spreadsheets: columns nobody named, commas that nobody quoted."""
    path = tmp_path / "edits.csv"
    path.write_text(content)
    with pytest.raises(EditFileError) as caught:
        read_edits(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert says in str(caught.value)


def test_a_planned_run_says_what_was_taken(wise: Wise, ready: Ready) -> None:
    """Benchmark files whose layout was taken for another: what became of the fields was never said."""
    Path("chat.jsonl").write_text(
        json.dumps({"messages": turns(("system", "Be brief."), ("user", "ba"), ("assistant", "do"))})
    )
    line = ("edit", ready.model, "chat.jsonl", "--dry-run")
    outcome = wise(*line)
    assert "chat.jsonl read as a chat, 1 record with 1 edit: the last turn of the assistant as target" in outcome.out
    assert "the first is 'ba' → 'do'" in outcome.out
    assert "chat.jsonl:1: `messages` is a chat with an earlier turn, which is no part of the prompt" in outcome.err
    assert json.loads(wise(*line, "--json").out)["results"]["taken"] == [
        line for line in outcome.out.splitlines() if line.startswith("chat.jsonl")
    ]


def test_unknown_columns_are_named(wise: Wise, ready: Ready) -> None:
    Path("edits.csv").write_text("prompt,target,ticket,subjct\nba be,do,4,x\n")
    err = wise("edit", ready.model, "edits.csv", "--dry-run").err
    assert "edits.csv:2: the field 'ticket' is unknown and was passed over" in err
    assert "did you mean `subject`?" in err
