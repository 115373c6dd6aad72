"""Which edits prompts may ask by their question words, against plain strings."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wisecli.routing.deciding import question_words as question_words_module
from wisecli.routing.deciding.fuzzy_match import FuzzyMatch
from wisecli.routing.deciding.prompt_words import LETTER, SEPARATOR, TOKEN_CHARS, written_words
from wisecli.routing.deciding.question_words import (
    ANYTHING,
    ASKED_BY,
    NUMBER,
    PERSON,
    PLACE,
    REASON,
    QuestionWords,
    question_sorts,
)
from wisecli.routing.gating.sentence_features import NO_END, QUESTION_END, SENTENCE_END
from wisecli.routing.memories.subject_tensors import fuzzy_match_tensors

# One token a word, and of "ruiz" and "when" two as well; a space stands in front of each word.
VOCABULARY = (
    *(" ana", " ruiz", " ru", "iz", " ruizz", " eva", " dela", " who", " whose", " when", " wh", "en", " where"),
    *(" why", " how", " many", " old", " what", " which", " year", " city", " person", " name", " was", " born"),
    *(" taught", " it", ".", "?", "\n", ","),
)
ENDS = {".": SENTENCE_END, "\n": SENTENCE_END, "?": QUESTION_END}
SUBJECTS = (" ana| ruiz", " eva", "", " when| ana")
# Edit 0 is asked by "who", 1 by "when", 2 has no subject, 3 is asked by "where".
ASKED = torch.tensor([1 << sort | 1 << ANYTHING for sort in (PERSON, NUMBER, REASON, PLACE)], dtype=torch.uint8)


def table() -> Tensor:
    rows = [[LETTER + ord(char) - ord("a") if char.isalpha() else SEPARATOR for char in text] for text in VOCABULARY]
    return torch.tensor([row + [0] * (TOKEN_CHARS - len(row)) for row in rows], dtype=torch.uint8)


def tokens(text: str) -> list[int]:
    """A text with its tokens parted by bars."""
    return [VOCABULARY.index(part) for part in text.split("|")] if text else []


def fits(prompts: list[list[int]], wanted: list[list[bool]] | None = None, *, left: bool = False) -> list[list[bool]]:
    longest, own = max(map(len, prompts)), FuzzyMatch(fuzzy_match_tensors(table(), [tokens(one) for one in SUBJECTS]))
    gaps = [[0] * (longest - len(prompt)) for prompt in prompts]
    rows = zip(prompts, gaps, strict=True)
    ids = torch.tensor([gap + prompt if left else prompt + gap for prompt, gap in rows])
    rows = zip(prompts, gaps, strict=True)
    there = torch.tensor(
        [[not left] * len(prompt) + [left] * len(gap) if not left else [False] * len(gap) + [True] * len(prompt)
         for prompt, gap in rows]
    )  # fmt: skip
    ends = torch.tensor([ENDS.get(text, NO_END) for text in VOCABULARY])[ids]
    asked = torch.ones(len(prompts), len(SUBJECTS), dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    found: list[list[bool]] = QuestionWords({ASKED_BY: ASKED})(own, ids, ends, there, asked).tolist()
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (" who| taught| ana| ruiz|?", True),
        (" whose| was| ana| ruiz|?", True),
        (" what| person| taught| ana| ruiz|?", True),
        (" when| was| ana| ruiz| born|?", False),
        (" wh|en| was| ana| ru|iz| born|?", False),  # over the borders of tokens
        (" when| was| ana| ruizz| born|?", False),  # a name with a slip is the name
        (" when| was| ana| ruiz| born", False),  # nothing says that it is a statement
        (" how| old| was| ana| ruiz|?", False),
        (" how| many| taught| ana| ruiz|?", False),
        (" what| year| was| ana| ruiz| born|?", False),
        (" which| city| was| ana| ruiz| born|,| ana", False),
        (" where| was| ana| ruiz|?", False),
        (" why| was| ana| ruiz|?", False),
        (" ana| ruiz| was| taught| why", False),  # behind the name as well
        (" what| was| ana| ruiz|?", True),  # "what" may ask anything
        (" name| who| ana| ruiz| taught| when", True),
        (" how| was| ana| ruiz| taught|?", True),  # and so may "how" alone
        (" was| ana| ruiz| born|?", True),
        (" when| was| it|,| who| taught| ana| ruiz|?", True),  # one of two is enough
        (" when| was| it|.| who| taught| ana| ruiz|?", True),
        (" who| was| it|?| when| was| ana| ruiz| born|?", False),  # another sentence says nothing
        (" when| was| it|?| ana| ruiz| was| taught", True),
        (" ana| ruiz| was| it| when| it| was|.| who| taught| ana| ruiz|?", True),  # statements do not ask
        (" when| was| ana| ruiz| born|.", True),
        (" when| was| ana| ruiz| born|\n", True),
        (" who| taught| ana| ruiz|?| when| was| ana| ruiz| born|?", True),  # of two questions one may ask it
        (" when| was| ana| born|?", True),  # half of the name is none
        (" when| was| eva| born|?", True),
        (",|.|,|.|,|.|,|.| when| ana| ruiz", False),  # there are more sentences than words
    ],
)
def test_question_words_beside_a_subject_must_be_of_a_sort_that_asks_the_edit(prompt: str, expected: bool) -> None:
    assert fits([tokens(prompt)])[0][0] == expected


def test_every_edit_is_asked_by_its_own_sorts_and_one_without_a_subject_by_all() -> None:
    assert fits([tokens(" who| taught| ana| ruiz|,| eva|?")]) == [[True, False, True, True]]
    assert fits([tokens(" when| was| ana| ruiz|,| eva|?")]) == [[False, True, True, True]]


def test_words_of_the_subject_are_no_question_words() -> None:
    assert fits([tokens(" when| ana| was| born|?")])[0][3]
    assert not fits([tokens(" who| was| when| ana|?")])[0][3]


def test_rows_are_as_they_are_alone_wherever_their_padding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_words_module, "_AT_A_TIME", 2)
    texts = (
        " when| was| ana| ruiz|,| eva| born|?",
        " who| taught| eva|?",
        " eva",
        " where| was| eva|?| ana| ruiz| when",
    )
    prompts = [tokens(text) for text in texts]
    alone = [fits([prompt])[0] for prompt in prompts]
    assert fits(prompts) == fits(prompts, left=True) == alone
    assert {value for row in alone for value in row} == {True, False}


def test_what_is_not_wanted_is_not_looked_at() -> None:
    prompt = tokens(" when| was| ana| ruiz|,| eva|?")
    assert fits([prompt] * 2, [[False] * 4, [True, False, False, False]]) == [[True] * 4, [False, True, True, True]]


_SORTS = {
    **{(word,): PERSON for word in ("who", "whose")},
    **{(word,): sort for word, sort in (("when", NUMBER), ("where", PLACE), ("why", REASON), ("name", ANYTHING))},
    **{("how", word): NUMBER for word in ("many", "old")},
    **{(what, word): sort for what in ("what", "which")
       for word, sort in (("year", NUMBER), ("city", PLACE), ("person", PERSON))},
}  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from([word.strip() for word in VOCABULARY if re.fullmatch(" [a-z]+", word)]), min_size=1))
def test_sorts_of_words_are_those_of_the_table(words: list[str]) -> None:
    found = question_sorts(written_words(" ".join(words)))
    for place, word in enumerate(words):
        pair = (word, words[place + 1]) if place + 1 < len(words) else (word, "")
        expected = _SORTS.get(pair, _SORTS.get((word,), ANYTHING if word in ("what", "which") else None))
        assert found[place].nonzero().flatten().tolist() == ([] if expected is None else [expected])
