from pathlib import Path

import pytest
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.data.corpus import texts_to_measure_with
from wisecli.edits.record import Edit, EvaluationPrompt
from wisecli.export.stock import base_answers as module
from wisecli.export.stock.base_answers import LENGTH, base_answers
from wisecli.models.loading import load_model
from wisecli.models.running.generation import generate
from wisecli.progress import ignore_progress


def test_answers_are_the_models_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load_model(save_tiny(tmp_path / "model"), CPU)
    first = base_answers(loaded, "one", [], ignore_progress)
    prompts = [row.prompt for row in first.asked]
    answers = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=LENGTH)
    assert [list(row.target) for row in first.asked] == answers
    monkeypatch.delattr(module, "generate")
    assert base_answers(loaded, "one", [], ignore_progress) == first
    with pytest.raises(NameError):
        base_answers(loaded, "another", [], ignore_progress)


def test_what_edits_leave_alone_is_looked_at_too(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tmp_path), CPU)
    edit = Edit("id", "ba be", "bi", locality=(EvaluationPrompt("do du", "da"),))
    rows = base_answers(loaded, "one", [edit], ignore_progress).rows
    assert len(rows) == len(texts_to_measure_with()) + 1
    assert rows[-1].prompt == tuple(loaded.tokenizer("do du da")["input_ids"])
