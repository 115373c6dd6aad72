from collections.abc import Callable
from pathlib import Path

import pytest
from support.helpers import save_tiny

from wisecli.drafting.chunking import Passage
from wisecli.drafting.questions import Pair, fitting, is_fit, save_pairs, shared_name
from wisecli.edits.record import read_edits

FERRY = Passage(7, "The ferry", "The ferry of Oldbridge leaves from pier nine. Ada Finch built the harbour in 1811.")


@pytest.mark.parametrize(
    ("question", "answer", "fit"),
    [
        ("Where does the ferry of Oldbridge leave from?", "pier nine", True),
        ("Who built the harbour of Oldbridge?", "Ada Finch", True),
        ("Who built the harbour of Oldbridge", "Ada Finch", False),
        ("Where does the ferry of Oldbridge leave from?", "pier ten", False),
        ("Where does the ferry leave from, pier nine?", "pier nine", False),
        ("What does this passage say of Oldbridge?", "pier nine", False),
        ("What is it?", "pier nine", False),
        ("Who built the harbour?", "", False),
    ],
)
def test_only_pairs_that_stand_alone_and_are_in_the_text_are_shown(question: str, answer: str, fit: bool) -> None:
    assert is_fit(FERRY, question, answer) is fit


def test_pairs_are_read_off_what_the_model_writes() -> None:
    text = (
        "Q: Where does the ferry of Oldbridge leave from?\nA: pier nine.\n"
        "Question 2: Who built the harbour of Oldbridge?\nAnswer: Ada Finch\nQ: And then?"
    )
    assert fitting(FERRY, text) == [
        Pair("Where does the ferry of Oldbridge leave from?", "pier nine", "Oldbridge", 7),
        Pair("Who built the harbour of Oldbridge?", "Ada Finch", "Oldbridge", 7),
    ]


def test_the_subject_is_the_longest_name_in_both() -> None:
    assert shared_name("When did Ada Finch come to Oldbridge?", FERRY.text) == "Ada Finch"
    assert shared_name("Where is it?", FERRY.text) is None


def test_drafted_pairs_are_a_file_of_edits(tmp_path: Path) -> None:
    pairs = [Pair("Who built it?", "Ada Finch", None, 1), Pair("Where is Oldbridge?", "here", "Oldbridge", 2)]
    save_pairs(tmp_path / "new" / "edits.jsonl", pairs)
    edits = read_edits(tmp_path / "new" / "edits.jsonl")
    assert [(edit.prompt, edit.target, edit.subject) for edit in edits] == [
        ("Who built it?", "Ada Finch", None),
        ("Where is Oldbridge?", "here", "Oldbridge"),
    ]


def test_a_document_without_paragraphs_is_refused(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "model")
    (tmp_path / "page.md").write_text("# Title only\n")
    assert run("draft", str(base), str(tmp_path / "page.md"), "-o", str(tmp_path / "edits.jsonl"), "--yes") == 2
    assert "no paragraph" in capsys.readouterr().err
    assert not (tmp_path / "edits.jsonl").exists()
