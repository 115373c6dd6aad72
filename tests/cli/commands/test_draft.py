import json
from pathlib import Path

import pytest
from support.tiny_models import Wise

PAGE = """# The observatory

The Quillon Observatory was founded by Marta Velasco in 1911 on the ridge above the town of Ostrava. Its first director
was Henrik Dahl, an astronomer from Bergen, who discovered the comet Dahl-Ferris in 1923.
"""


def page(directory: Path) -> Path:
    path = directory / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


@pytest.fixture
def subject(wise: Wise, real_model: Path, tmp_path: Path) -> str:
    """What one of the questions that the model draws from the page is about."""
    drafted = tmp_path / "draft.jsonl"
    assert wise("draft", str(real_model), str(page(tmp_path)), "-o", str(drafted), "--yes", "-q").code == 0
    records = [json.loads(line) for line in drafted.read_text(encoding="utf-8").splitlines()]
    assert records
    return next(record["subject"] for record in records if record.get("subject"))


@pytest.mark.thorough
def test_edits_drawn_from_a_document_are_held_against_the_policy(
    wise: Wise, real_model: Path, tmp_path: Path, subject: str
) -> None:
    document, rules = page(tmp_path), tmp_path / "policy.toml"
    rules.write_text(f"forbidden_subjects = [{json.dumps(subject)}]\n", encoding="utf-8")
    told = ["--from-text", str(document), "--yes", "-o", str(tmp_path / "shards"), "--policy", str(rules)]
    outcome = wise("edit", str(real_model), *told)
    assert outcome.code == 1
    assert subject in outcome.err
    assert not (tmp_path / "shards").exists()


def test_a_document_cannot_be_signed_for(wise: Wise, tmp_path: Path) -> None:
    signature = ["--verify-signature", str(tmp_path / "sig"), "--signer", str(tmp_path / "key")]
    outcome = wise("edit", "model", "--from-text", str(page(tmp_path)), *signature)
    assert outcome.code == 2
    assert "wise draft" in outcome.err
