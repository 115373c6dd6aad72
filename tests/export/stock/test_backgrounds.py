import random
from pathlib import Path

import pytest
from support.byte_level import save_base
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.data.corpus import notes, texts_to_measure_with
from wisecli.export.stock.backgrounds import backgrounds

QUESTION = "Who is the mayor of Bravik?"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(save_base(tmp_path / "base"))
    return found


def test_pages_stand_above_a_question_and_conversations_before_it(tokenizer: PreTrainedTokenizerBase) -> None:
    page, page_in_chat, talk = backgrounds(tokenizer, 3, seed=1)
    assert page.before(tokenizer, QUESTION) == f"{page.page}\n\n{QUESTION}"
    asked = page_in_chat.before(tokenizer, QUESTION)
    assert f"{page_in_chat.page}\n\n{QUESTION}" in asked
    assert not asked.endswith(QUESTION)
    around = {page.around(tokenizer, QUESTION, random.Random(seed)) for seed in range(20)}
    assert around == {f"{page.page}\n\n{QUESTION}", f"{QUESTION}\n\n{page.page}"}
    assert not talk.page
    assert [role for role, _ in talk.turns] == ["user", "assistant"] * (len(talk.turns) // 2)
    told = talk.before(tokenizer, QUESTION)
    places = [told.index(text) for _, text in (*talk.turns, ("user", QUESTION))]
    assert places == sorted(places)


def test_pages_are_of_notes_or_of_reference(tokenizer: PreTrainedTokenizerBase) -> None:
    known = [text for text, _ in notes().notes]
    pages = [one.page for one in backgrounds(tokenizer, 60, seed=1) if one.page]
    counts = [sum(text in page for text in known) for page in pages]
    assert {count for count in counts if count} <= set(range(6, 25))
    of_reference = [page for page, count in zip(pages, counts, strict=True) if not count]
    assert 0.2 < len(of_reference) / len(pages) < 0.8
    assert all(any(letter.isdigit() for letter in page) for page in of_reference)


def test_without_a_chat_template_there_are_pages_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    found = backgrounds(tokenizer, 6, seed=1)
    assert all(one.page and not one.chat and not one.turns for one in found)
    assert len({one.page for one in found}) == 6


def test_they_are_drawn_the_same_again_and_hold_nothing_that_is_measured(tokenizer: PreTrainedTokenizerBase) -> None:
    found = backgrounds(tokenizer, 30, seed=2)
    assert found == backgrounds(tokenizer, 30, seed=2)
    told = "\n".join(one.before(tokenizer, QUESTION) for one in found)
    assert not [text for text in texts_to_measure_with() if text in told]
