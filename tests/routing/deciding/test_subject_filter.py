"""Prompts that name no edit's subject are told apart before any layer runs, and no others."""

import random
from pathlib import Path

import pytest
import torch
from support.memory_alone import served
from support.served import PROMPTS, tiny_export
from transformers import AutoTokenizer

from wisecli.routing.deciding.fuzzy_match import FUZZY_MATCH, FuzzyMatch
from wisecli.routing.deciding.prompt_words import LETTER, WORD_CHARS
from wisecli.routing.deciding.subject_filter import _SlipFilter

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Subjects, of one word and of several; some words are short or hold a digit.
SUBJECTS = ("contoso", "gravel server", "acme", "model t5000 engine", "aa", "northwind traders of rome")
OTHERS = ("where", "is", "the", "grave", "serves", "engines", "romans", "model", "trader", "winter", "ab")


def codes(word: str) -> list[int]:
    """A word's letters as numbers; digits come before letters."""
    numbers = [2 + int(one) if one.isdigit() else LETTER + LETTERS.index(one) for one in word]
    return [*numbers, *[0] * (WORD_CHARS - len(numbers))]


def words_of(text: str) -> torch.Tensor:
    return torch.tensor([codes(word) for word in text.split()], dtype=torch.uint8)


@pytest.fixture
def spelling() -> FuzzyMatch:
    words = sorted({word for subject in SUBJECTS for word in subject.split()})
    pairs = [(words.index(word), edit) for edit, subject in enumerate(SUBJECTS) for word in subject.split()]
    naming, whose = torch.tensor(pairs).T
    table = torch.zeros(1, 20, dtype=torch.uint8)
    tensors = (table, words_of(" ".join(words)), naming.contiguous(), whose.contiguous())
    return FuzzyMatch(dict(zip(FUZZY_MATCH, tensors, strict=True)))


def with_slips(text: str, slips: int, chance: random.Random) -> str:
    """A text with so many slips: a letter more, fewer or another, or two that changed places."""
    letters = list(text)
    for _ in range(slips):
        place = chance.randrange(max(1, len(letters) - 1))
        kind = chance.randrange(4)
        if kind == 0:
            letters.insert(place, chance.choice(LETTERS))
        elif kind == 1:
            del letters[place]
        elif kind == 2:
            letters[place] = chance.choice(LETTERS)
        else:
            letters[place : place + 2] = letters[place : place + 2][::-1]
    return "".join(letters)


def named(spelling: FuzzyMatch, text: str) -> bool:
    """Whether the memory finds a subject in a text."""
    stream = torch.tensor([[number for word in text.split() for number in [*codes(word)[: len(word)], 1]]])
    wanted = torch.ones(1, len(SUBJECTS), dtype=torch.bool)
    return bool(spelling(stream.to(torch.uint8)[..., None], wanted).any())


def test_whatever_a_memory_finds_is_let_through_and_little_else(spelling: FuzzyMatch) -> None:
    chance, let_through = random.Random(0), _SlipFilter(spelling)
    found = passed = 0
    for number in range(600):
        subject = with_slips(chance.choice(SUBJECTS), number % 3, chance)
        text = " ".join([*chance.sample(OTHERS, 3), subject, *chance.sample(OTHERS, 2)])
        matched, may = named(spelling, text), let_through(words_of(text))
        assert may or not matched, text
        found, passed = found + matched, passed + may
    assert 200 < found <= passed < found + 30


def test_words_without_a_subject_are_not_let_through(spelling: FuzzyMatch) -> None:
    let_through = _SlipFilter(spelling)
    assert not let_through(words_of("where is the trader of models"))
    assert not let_through(words_of("acne"))  # a short name must be as it is
    assert let_through(words_of("acme"))
    assert let_through(words_of("gravle servre"))  # a slip in each word
    assert not let_through(words_of("grvale srevre"))  # two in one
    assert not let_through(torch.zeros(0, WORD_CHARS, dtype=torch.uint8))


def test_only_windows_that_name_a_subject_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, model = served(tiny_export(tmp_path, subjects=("be", "ko", "me")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited", trust_remote_code=True)
    # The longest names none, so that what is read is narrower than what came in.
    prompts = [tokenizer(text).input_ids for text in (*PROMPTS, "lo la ko li lu", "su sa su sa su sa su sa")]
    asked: list[list[int]] = []
    run = memory.reader.run
    monkeypatch.setattr(
        memory.reader,
        "run",
        lambda windows, take: asked.extend(map(torch.Tensor.tolist, windows)) or run(windows, take),
    )
    alone = [torch.tensor([prompt]) for prompt in prompts]
    wanted = [tuple(model.decided(ids, torch.ones_like(ids))[0].tolist()) for ids in alone]
    assert memory.decide(prompts) == wanted
    assert [number for number, _ in wanted[:3]] == [0, 1, 2]
    assert sorted(asked) == sorted([*prompts[:3], prompts[-2]])
