import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.artifacts.shard import Evidence
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, MergeSettings
from wisecli.editing.examples.paraphrases import asks_the_same, usable
from wisecli.edits.reading.record_fields import Translation
from wisecli.edits.record import Edit, read_edits
from wisecli.errors import EditFileError

MAYOR = Edit("a", "Who is the mayor of Oldbridge?", "Ada Finch", subject="Oldbridge")


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("What is the name of the mayor of Oldbridge?", True),
        ("The mayor of Oldbridge is", True),
        ("Who is the mayor of Oldbridge?", False),
        ("Who is the mayor of Newbridge?", False),
        ("Is Ada Finch the mayor of Oldbridge?", False),
        ("Which river runs through Oldbridge?", False),
        ("The mayor of Oldbridge", False),
    ],
)
def test_a_paraphrase_asks_for_the_same_and_gives_nothing_away(text: str, same: bool) -> None:
    assert asks_the_same(MAYOR, text) is same


def test_of_what_the_model_writes_only_usable_lines_are_kept_once() -> None:
    texts = [
        '"The mayor of Oldbridge is Bo Hill."',
        "the mayor of Oldbridge IS",
        "Which river runs through Oldbridge?",
        "",
    ]
    assert usable(MAYOR, texts) == ["The mayor of Oldbridge is"]


RECORD: dict[str, Any] = {
    "id": "one",
    "prompt": "ba be bi",
    "target": "do du",
    "translations": {"de": {"prompt": "ka ke", "target": "fa"}, "fr": {"prompt": "ma me mi", "target": "ga ge gi"}},
}


def evidence_of(place: Path, records: list[dict[str, Any]], **settings: Any) -> Evidence:
    (place / "edits.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = EditSettings(layer="2", unrelated_texts=16, **settings)
    run_edit(
        str(place / "model"), place / "edits.jsonl", place / "shards", given, load=CPU, options=RunOptions(force=True)
    )
    directory = read_shard_directory(place / "shards")
    return directory.load(directory.shards[0]).evidence


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("further")
    save_tiny(root / "model")
    return root


def test_paraphrases_recall_the_residuals_of_their_edit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = evidence_of(place, [{**RECORD, "translations": {}}])
    monkeypatch.setattr(
        "wisecli.editing.run.worker.write_paraphrases", lambda *_, **__: {"one": ("mu mo", "na ne ni no")}
    )
    found = evidence_of(place, [{**RECORD, "translations": {}}], augment=2)
    contexts = set(found.context.tolist()) - set(plain.context.tolist())
    assert len(contexts) == 2
    first = {int(position): found.residuals[found.context == 0][at] for at, position in enumerate([0, 1])}
    for context in contexts:
        rows = found.context == context
        for position, residual in zip(found.position[rows].tolist(), found.residuals[rows], strict=True):
            if position in first:
                torch.testing.assert_close(residual, first[position])


def test_translations_are_learnt_and_measured_by_language(place: Path) -> None:
    evidence_of(place, [RECORD])
    memory = place / "memory"
    merge([place / "shards"], memory, force=True, settings=MergeSettings())
    report = evaluate(memory, EvalSettings(generate=False), load=CPU)
    assert report.after["reliability"] == 1
    for language in ("de", "fr"):
        assert report.after[f"generalization_{language}"] == 1
        assert report.before[f"generalization_{language}"] < 1


@pytest.mark.parametrize(
    "translations",
    [
        ["de"],
        {"deutsch!": {"prompt": "a", "target": "b"}},
        {"de": {"prompt": "a"}},
        {"de": {"prompt": " ", "target": "b"}},
    ],
)
def test_translations_that_are_none_are_refused(tmp_path: Path, translations: Any) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({**RECORD, "translations": translations}))
    with pytest.raises(EditFileError, match=r"edits\.jsonl:1: `translations` must"):
        read_edits(path)


def test_translations_are_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(RECORD))
    (edit,) = read_edits(path)
    assert edit.translations == (Translation("de", "ka ke", "fa"), Translation("fr", "ma me mi", "ga ge gi"))
    assert Edit.from_dict(json.loads(json.dumps(edit.as_dict()))) == edit
