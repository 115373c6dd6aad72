import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import WORDS, tiny_tokenizer
from support.rivals import EDITS, TEXTS, TRAIN, tiny_bench

from wisecli.bench.methods.context.retrieval import Facts, TermIndex, fitted_threshold, scope_threshold
from wisecli.edits.record import Edit

BACKGROUND = [*(edit.prompt for edit in TRAIN), *TEXTS]


def bag(text: str) -> np.ndarray:
    """TF-IDF over words, written out."""
    words = sorted({word for line in (*BACKGROUND, *(edit.prompt for edit in EDITS), text) for word in line.split()})
    rarity = [
        1 + np.log((1 + len(BACKGROUND)) / (1 + sum(word in line.split() for line in BACKGROUND))) for word in words
    ]
    vector = np.array([text.split().count(word) for word in words]) * np.array(rarity)
    return dict(zip(words, vector / np.linalg.norm(vector), strict=True))


def similarity(one: str, other: str) -> float:
    first, second = bag(one), bag(other)
    return sum(weight * second.get(word, 0.0) for word, weight in first.items())


def test_scores_are_cosines_of_tfidf() -> None:
    index = TermIndex(tiny_tokenizer(), BACKGROUND)
    index.add([edit.prompt for edit in EDITS[:2]])
    index.add([edit.prompt for edit in EDITS[2:]])
    for text in ("ba be ke", "MA ba ma", "vo vu", "ta te ti to"):
        expected = [similarity(text.lower(), edit.prompt) for edit in EDITS]
        assert index.scores(text).tolist() == pytest.approx(expected, abs=1e-5)
    assert index.bytes() == 8 * sum(len(edit.prompt.split()) for edit in EDITS)


def test_the_latest_edit_of_a_prompt_is_the_one_that_is_found() -> None:
    facts = Facts(TermIndex(tiny_tokenizer(), BACKGROUND))
    assert facts.ranked("ba", 3) == []
    later, latest = Edit("later", "ba be bi", "zu"), Edit("latest", "ba be bi", "za")
    facts.add([*EDITS, later])
    assert facts.ranked("ba be bi", 1)[0][0] == later
    facts.add([latest])
    assert facts.ranked("ba be bi", 1) == [(latest, pytest.approx(1.0))]
    assert {edit.id for edit, _ in facts.ranked("ba be bi", 99)} == {"latest", "two", "three", "four"}
    order = sorted([*EDITS[1:], latest], key=lambda edit: -similarity("ta ke ti", edit.prompt))
    assert [edit.id for edit, _ in facts.ranked("ta ke ti", 2)] == [edit.id for edit in order[:2]]


scores = st.lists(st.integers(0, 20).map(lambda tenth: tenth / 20), min_size=1, max_size=12)


@given(scores, scores)
def test_no_threshold_tells_better_apart(inside: list[float], outside: list[float]) -> None:
    def right(threshold: float) -> float:
        return np.mean(np.array(inside) > threshold) + np.mean(np.array(outside) <= threshold)

    best = max(right(threshold) for threshold in np.linspace(-1, 2, 601) + 1e-4)
    assert right(fitted_threshold(inside, outside)) == pytest.approx(best)


def in_form(place: int, text: str) -> str:
    """A text in the form whose turn it is, in the words that the tokenizer knows."""
    forms = ["{}", "Question: {}\nAnswer:", "### Instruction:\n{}\n\n### Response:\n"]
    found = re.findall(r"\w+", forms[place].replace("{}", text).lower())
    return " ".join(word if word in WORDS else "unknown" for word in found)


def test_the_threshold_tells_rephrases_from_everything_else_in_forms_in_turn(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    threshold = scope_threshold(bench, TermIndex(bench.loaded.tokenizer, BACKGROUND), "rag")
    inside, outside = [], [max(similarity(in_form(*pair), edit.prompt) for edit in TRAIN) for pair in enumerate(TEXTS)]
    for place, edit in enumerate(TRAIN):
        inside += [similarity(in_form(place, text), edit.prompt) for text in edit.rephrases]
        elsewhere = [in_form(place, probe.prompt) for probe in edit.locality]
        outside += [max(similarity(text, edit.prompt) for edit in TRAIN) for text in elsewhere]
        others = [other for other in TRAIN if other != edit]
        outside.append(max(similarity(in_form(place, edit.prompt), other.prompt) for other in others))
    assert max(outside) < threshold < min(inside)
    assert threshold == pytest.approx((max(outside) + min(inside)) / 2, abs=1e-4)
