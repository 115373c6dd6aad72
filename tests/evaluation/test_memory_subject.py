from pathlib import Path

import pytest
from support.evaluation import edited_model, text_of
from support.helpers import choice_of, random_rows

from wisecli.config import EvalSettings
from wisecli.evaluation.memory_subject import MemorySubject
from wisecli.progress import ignore_progress

PROMPTS = random_rows(*[(1 + number % 11, 1) for number in range(24)], seed=5)


@pytest.mark.parametrize(
    ("kind", "pooling", "memories"),
    [("matrix", "last", 2), ("matrix", "mean", 2), ("lookup", "last", 2), ("facts", "last", 2)],
)
def test_what_no_memory_opens_for_is_answered_as_by_the_unedited_model(
    tmp_path: Path, kind: str, pooling: str, memories: int
) -> None:
    edited = edited_model(tmp_path, kind=kind, pooling=pooling, memories=memories)
    subject = MemorySubject(edited, EvalSettings(batch_size=5), ignore_progress)
    texts = list(dict.fromkeys(text_of(edited, row.prompt) for row in PROMPTS))
    with edited.unedited():
        choices = [
            choice_of(edited.model, edited.manifest.site, edited.manifest.memory, edited.tokenizer(text)["input_ids"])
            for text in texts
        ]
    found = subject.opened(texts)
    assert found == [choice is not None for choice in choices]
    assert any(found) and not all(found)
    answers = subject.answering(8)
    shut = [text for text, opens in zip(texts, found, strict=True) if not opens]
    assert answers.after(shut, stage="test") == answers.before(shut)
