"""What a command is told in vain is said on stderr; what an edit would be lost by is refused."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ready import EDITS, Ready, here
from support.tiny_models import Wise

from wisecli.cli.unknown_settings import unknown_names

PLAN = ("edit", "{model}", "edits.jsonl", "--dry-run")
BOTH = ("eval", "--memory", "{memory}", "--protocol", "forms,wild")


def warnings(wise: Wise, ready: Ready, *line: str) -> list[str]:
    places = {name: getattr(ready, name) for name in ("model", "shards", "shards_at_matrix", "memory")}
    outcome = wise(*(one.format(**places) for one in line))
    assert outcome.code == 0, outcome.err
    return [one.removeprefix("warning: ") for one in outcome.err.splitlines() if one.startswith("warning: ")]


def write(**fields: Any) -> None:
    Path("edits.jsonl").write_text(json.dumps({"prompt": "ba be", "target": "do", "subject": "ba", **fields}) + "\n")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targt": "do", "target": None}, ("'targt'", "`target`")),
        ({"promt": "ba"}, None),
        ({"opp": "erase"}, ("'opp'", "`op`")),
        ({"replacment": "da", "op": "erase"}, ("'replacment'", "`replacement`")),
        ({"Translations": {}}, ("'Translations'", "`translations`")),
    ],
)
def test_a_field_without_which_the_edit_is_another_is_refused(
    wise: Wise, ready: Ready, fields: dict[str, Any], says: tuple[str, str] | None
) -> None:
    record = {name: value for name, value in {"prompt": "ba be", "target": "do", **fields}.items() if value is not None}
    Path("edits.jsonl").write_text(json.dumps(record))
    outcome = wise("edit", ready.model, "edits.jsonl", "--dry-run")
    if says is None:  # the prompt is there as well
        assert outcome.code == 0
        assert "did you mean `prompt`?" in outcome.err
        return
    assert outcome.code == 2
    assert outcome.err.startswith("error: edits.jsonl:1: ")
    assert all(one in outcome.err for one in says)


def test_a_field_that_nothing_reads_is_named_once_with_its_first_line(wise: Wise, ready: Ready) -> None:
    lines = [{"subject": edit["prompt"], **edit, "subjct": "x", "ticket": number} for number, edit in enumerate(EDITS)]
    Path("edits.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert warnings(wise, ready, *PLAN) == [
        "edits.jsonl:1: the field 'subjct' is unknown and was passed over (and in 3 more); did you mean `subject`?",
        "edits.jsonl:1: the field 'ticket' is unknown and was passed over (and in 3 more)",
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"src": "ba", "alt": "do", "answers": ["x"], "pred": "y", "cond": "z", "loc": "ka", "loc_ans": "ke"},
        {"prompt": "ba", "target_new": "do", "ground_truth": "x", "context": "c", "cond": "d", "tagret": 1},
        {"prompt": "ba", "target_new": "do", "ood_rephrase": "da", "locality_prompt": "a", "relation": "b"},
        {"update": "ba", "ans": "do", "tag": "x", "personas": "p", "relation_type": "r"},
        {"requested_rewrite": {"prompt": "{}", "subject": "ba", "target_new": {"str": "do"}}, "pararel_idx": 3},
    ],
)
def test_of_a_benchmark_no_field_is_named(wise: Wise, ready: Ready, record: dict[str, Any]) -> None:
    Path("edits.jsonl").write_text(json.dumps({"subject": "ba", **record}))
    assert warnings(wise, ready, *PLAN) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "ba", "target": "do", "target": "da"}',
        '[{"prompt": "ba", "prompt": "be", "target": "do"}]',
        '{"prompt": "ba", "target": "do", "locality": [{"prompt": "a", "answer": "b", "answer": "c"}]}',
    ],
)
def test_a_name_that_is_there_twice_in_one_object_is_refused(wise: Wise, ready: Ready, text: str) -> None:
    Path("edits.jsonl").write_text(text)
    outcome = wise("edit", ready.model, "edits.jsonl", "--dry-run")
    assert outcome.code == 2
    assert "is there twice in one object" in outcome.err


def test_unknown_tables_keys_and_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wise: Wise, ready: Ready
) -> None:
    file = tmp_path / "wise.toml"
    file.write_text("passes = 3\n[edits]\npasses = 3\n[edit]\npasses = 3\n[merge]\n[eval]\n[bench]\n")
    monkeypatch.setenv("WISE_PASES", "3")
    monkeypatch.setenv("WISE_MASK_RATIO", "0.5")
    assert unknown_names(file) == [
        f"{file}: the key 'passes' is unknown and was passed over; write it below [edit]",
        f"{file}: the table 'edits' is unknown and was passed over; did you mean 'edit'?",
        "the variable WISE_PASES is unknown and was passed over; did you mean 'WISE_PASSES'?",
    ]
    write()
    assert len(warnings(wise, ready, *PLAN, "--config", str(file))) == 3
    file.write_text("[edit]\npases = 3\n")
    outcome = wise("edit", ready.model, "edits.jsonl", "--dry-run", "--config", str(file))
    assert outcome.code == 2
    assert "did you mean 'passes'?" in outcome.err


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ((*PLAN, "--who", "me", "--reason", "why", "--yes"), ["--who", "--reason", "--yes"]),
        ((*PLAN, "--set", "interval=3"), ["interval=3.0"]),
        ((*PLAN, "--revision", "main"), ["--revision"]),
        ((*PLAN, "--set", "passes=3"), ["passes=3"]),
        ((*PLAN, "--set", "mask_ratio=.3", "--set", "weight_decay=.1"), ["weight_decay=0.1", "mask_ratio=0.3"]),
        ((*PLAN, "--set", "writer=gradient", "--set", "passes=3", "--set", "residual_steps=3"), ["residual_steps=3"]),
        ((*PLAN, "--set", "writer=gradient", "--set", "weight_decay=.1"), ["weight_decay=0.1"]),
        (("merge", "{shards}", "--dry-run", "--mode", "lookup", "--method", "ties"), []),
        (("merge", "{shards}", "--dry-run", "--mode", "lookup", "--method", "sign"), ["--method"]),
        (("merge", "{shards}", "--dry-run", "--mode", "lookup", "--set", "seed=2"), ["seed=2"]),
        (("merge", "{shards_at_matrix}", "--dry-run", "--mode", "merge", "--set", "subjects=any"), ["subjects=any"]),
        (("merge", "{shards_at_matrix}", "--dry-run", "--mode", "retrieve", "--set", "strength=2"), ["strength=2.0"]),
        (("merge", "{shards}", "--dry-run", "--no-history", "--who", "me"), ["--who"]),
        (("eval", "--memory", "{memory}", "--no-generate", "--if-measured"), ["--if-measured"]),
        (
            ("eval", "--memory", "{memory}", "--no-generate", "--ask", "3", "--set", "before=true"),
            ["--ask", "before=True"],
        ),
        (("eval", "--memory", "{memory}", "--forms", "none", "--set", "before=true"), ["before=True"]),
        (("eval", "--memory", "{memory}", "--protocol", "teacher", "--forms", "all"), ["--forms"]),
        ((*BOTH, "--forms", "bare", "--ask", "1", "--set", "before=true", "--if-measured"), ["--if-measured"]),
        (("export", "--memory", "{memory}", "--dry-run", "--private"), ["--private"]),
        (("export", "--memory", "{memory}", "--dry-run", "--format", "delta", "--dtype", "float32"), ["--dtype"]),
    ],
)
def test_flags_without_effect_are_named(wise: Wise, ready: Ready, line: tuple[str, ...], flags: list[str]) -> None:
    write()
    found = warnings(wise, ready, *line)
    if flags == []:
        flags = ["--method"]  # given as it is by default is given all the same
    assert [one.removeprefix("--set ").split()[0] for one in found] == flags
    assert all("has no effect" in one for one in found)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("edit", "{model}", "edits.jsonl", "--watch"), "--into"),
        (("edit", "{model}", "edits.jsonl", "--into", "new", "--dry-run"), "--dry-run"),
        (("merge", "{shards}", "--into", "new", "--dry-run"), "--dry-run"),
    ],
)
def test_flags_by_which_something_else_would_be_done_are_refused(
    wise: Wise, ready: Ready, line: tuple[str, ...], says: str
) -> None:
    write()
    outcome = wise(*(one.format(model=ready.model, shards=ready.shards) for one in line))
    assert outcome.code == 2
    assert says in outcome.err
    assert here() == ["edits.jsonl"]


def test_edits_come_through_a_pipe_without_a_memory(wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    pipe('{"prompt": "ba be", "target": "do"}\n')
    outcome = wise("edit", ready.model, "-", "-o", "out")
    assert (outcome.code, here()) == (0, ["out"])
    assert "1 edit in 1 shard of " in outcome.out
    for more in ((), ("--into", "memory")):
        pipe('{"prompt": "ba be", "target": "do"}\n{"prompt"\n')
        outcome = wise("edit", ready.model, "-", "-o", "other", *more)
        assert outcome.code == 2
        assert "error: <stdin>:2: " in outcome.err


@pytest.mark.parametrize("line", ["inspect {shards}", "diff {shards} {memory}", "verify {memory}"])
def test_every_command_can_be_quiet(wise: Wise, ready: Ready, line: str) -> None:
    arguments = line.format(shards=ready.shards, memory=ready.memory).split()
    assert wise(*arguments, "-q").out == wise(*arguments).out
