"""Kinds of prompts that mention an edit or ask it in other ways."""

import random

import pytest
from support.helpers import save_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.models.prompts.pattern_slots import SLOTS, SLOTS_WITH_A_WAY, slots_in
from wisecli.models.prompts.prompt_kinds import Fact, Kind, documents, kinds

QUESTION = "Who is the chief executive of Northwind Traders?"
OTHER = Fact("In which year was Margie's Travel founded?", "Margie's Travel", "1987")
FACT = Fact(QUESTION, "Northwind Traders", "Amara Lindqvist", "Noor Haddad", second=OTHER)
PATTERNS = [
    (kind, trained, pattern)
    for kind in kinds().values()
    for trained in (True, False)
    for pattern in kind.patterns(trained=trained)
]
ASKED = [kind for kind in kinds().values() if kind.asked]
MENTIONED = [kind for kind in kinds().values() if not kind.asked]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama"))


def written(
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    fact: Fact = FACT,
    *,
    seed: int = 0,
    trained: bool = True,
    chat: bool = True,
) -> str | None:
    return kind.sample_prompt(tokenizer, fact, trained=trained, rng=random.Random(seed), chat=chat)


@pytest.mark.parametrize("trained", [True, False])
def test_there_are_enough_of_everything(trained: bool) -> None:
    wrappers = [kind for kind in MENTIONED if kind.name not in ("other time", "near name")]
    assert sum(kind.count(trained=trained) for kind in wrappers) >= 40
    assert kinds()["other time"].count(trained=trained) >= 15
    assert len(documents(trained=trained)) >= 10
    assert all(len(document.asks) >= 3 for document in documents(trained=trained))
    assert all(kind.count(trained=trained) >= 2 for kind in kinds().values())


def test_halves_are_apart_and_no_pattern_is_of_two_kinds() -> None:
    texts = [pattern for _, _, pattern in PATTERNS]
    assert len(set(texts)) == len(texts)
    labels = [kind.label for kind in kinds().values()]
    assert len(set(labels)) == len(labels)
    assert not {document.text for document in documents(trained=True)} & {d.text for d in documents(trained=False)}


def test_documents_are_of_forty_to_a_hundred_and_fifty_words() -> None:
    for document in (*documents(trained=True), *documents(trained=False)):
        assert 40 <= len(document.text.split()) <= 150
        assert document.text.count("{subject}") == document.text.count("{sentence}") == 1


@pytest.mark.parametrize(("kind", "trained", "pattern"), PATTERNS)
def test_slots_are_known(kind: Kind, trained: bool, pattern: tuple[str, ...]) -> None:
    for name, way in [slot for turn in pattern for slot in slots_in(turn)]:
        assert name in (SLOTS_WITH_A_WAY if way else SLOTS)
    assert any(slots_in(turn) for turn in pattern)


@pytest.mark.parametrize("name", sorted(kinds()))
def test_a_fact_is_written_in_every_kind_the_same_by_seed(real_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    kind = kinds()[name]
    for trained in (True, False):
        texts = [written(kind, real_tokenizer, seed=seed, trained=trained) for seed in range(12)]
        assert texts == [written(kind, real_tokenizer, seed=seed, trained=trained) for seed in range(12)]
        assert len(set(texts)) > 1
        assert all(texts)
        assert not any(f"{{{slot}}}" in str(text) for text in texts for slot in SLOTS)


def test_chats_need_a_template(real_tokenizer: PreTrainedTokenizerBase, bare: PreTrainedTokenizerBase) -> None:
    assert written(kinds()["follow-up"], bare) is None
    assert written(kinds()["follow-up"], real_tokenizer, chat=False) is None
    assert str(written(kinds()["translate"], real_tokenizer)).endswith("<|im_start|>assistant\n")
    assert "<|im_start|>" not in str(written(kinds()["translate"], real_tokenizer, chat=False))
    assert QUESTION in str(written(kinds()["translate"], bare))


def test_an_answer_is_begun_in_the_assistants_turn_or_bare(real_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [str(written(kinds()["begun target"], real_tokenizer, seed=seed)) for seed in range(12)]
    assert {text.endswith("assistant\nAmara") for text in texts} == {True, False}
    assert all(text.endswith("Amara") for text in texts)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("keywords", "subject"),
        ("story", "subject"),
        ("document with the new value", "answer"),
        ("document with another value", "other"),
        ("two facts", "second"),
        ("begun target", "answer"),
    ],
)
def test_what_a_fact_lacks_is_not_written(real_tokenizer: PreTrainedTokenizerBase, name: str, lacks: str) -> None:
    fact = Fact(**{**vars(FACT), lacks: None})
    assert written(kinds()[name], real_tokenizer, fact) is None


def test_documents_say_the_value_that_they_are_of(real_tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(9):
        new, other, neither = (
            str(written(kinds()[f"document {name}"], real_tokenizer, seed=seed))
            for name in ("with the new value", "with another value", "without a value")
        )
        assert "Amara Lindqvist" in new and "Amara Lindqvist" not in other + neither
        assert "Noor Haddad" in other and "Noor Haddad" not in new + neither
        assert all("Northwind Traders" in text for text in (new, other, neither))


def test_a_page_has_100_to_600_words_and_does_not_name_the_subject(real_tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(20):
        text = str(written(kinds()["question first"], real_tokenizer, seed=seed, chat=False))
        assert 100 <= len(text.split()) <= 640
        assert text.count("Northwind Traders") == 1


def test_a_follow_up_names_the_subject_in_the_first_turn_alone(real_tokenizer: PreTrainedTokenizerBase) -> None:
    text = str(written(kinds()["follow-up"], real_tokenizer))
    assert text.count("Northwind Traders") == 1
    assert "the chief executive of it" in text


def test_a_question_beside_shares_no_word_with_the_edits(real_tokenizer: PreTrainedTokenizerBase) -> None:
    fact = Fact("What is the website of Contoso?", "Contoso", "contoso.example")
    texts = {written(kinds()["other question"], real_tokenizer, fact, trained=False, seed=seed) for seed in range(40)}
    assert not any("website" in str(text) for text in texts)
