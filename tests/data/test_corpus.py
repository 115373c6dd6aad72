"""Texts that come with the package: as many as are asked for, filled, and apart from those that are measured with."""

import json
import re
from pathlib import Path

from wisecli.data.corpus import everyday_prompts, reference_pages, relations, unrelated_texts
from wisecli.edits.record import read_edits

ROOT = Path(__file__).parents[2]


def test_everyday_prompts_are_filled_and_mostly_different() -> None:
    prompts = everyday_prompts(600, seed=0)
    assert len(prompts) == 600
    assert len(set(prompts)) > 450
    assert not [prompt for prompt in prompts if "{" in prompt or "}" in prompt]


def test_everyday_prompts_of_a_seed_are_always_the_same() -> None:
    assert everyday_prompts(200, seed=1) == everyday_prompts(300, seed=1)[:200]
    assert everyday_prompts(200, seed=1) != everyday_prompts(200, seed=2)


def test_everyday_prompts_are_not_those_of_other_texts() -> None:
    assert not set(everyday_prompts(600, seed=0)) & set(unrelated_texts(600, seed=0))


def test_reference_pages_are_filled_full_of_numbers_and_all_different() -> None:
    pages = reference_pages(200, seed=0)
    assert not [page for page in pages if set(page) & set("{}#")]
    assert len(set(pages)) == 200
    digits = sum(letter.isdigit() for page in pages for letter in page)
    assert digits > 0.05 * sum(map(len, pages))
    assert pages[:20] == reference_pages(20, seed=0)
    assert pages[:20] != reference_pages(20, seed=1)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+|{}", text.lower()))


def test_what_is_near_a_relation_is_none_of_its_wordings() -> None:
    for relation in relations():
        assert len(set(relation.near)) == len(relation.near) == 8, relation.asks[0]
        assert all(text.count("{}") == 1 for text in relation.near), relation.asks[0]
        assert not set(map(_words, relation.near)) & set(map(_words, relation.wordings)), relation.asks[0]


def test_nothing_near_a_relation_is_what_is_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/near_questions.json").read_text(encoding="utf-8"))
    subjects = {edit.id: str(edit.subject) for edit in read_edits(ROOT / "sample_edits/edits.jsonl")}
    assert subjects.keys() == measured.keys()
    asked = {_words(text.replace(subjects[name], "{}")) for name, texts in measured.items() for text in texts}
    assert len(asked) == sum(map(len, measured.values()))
    assert not asked & {_words(text) for relation in relations() for text in relation.near}
