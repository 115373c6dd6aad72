"""One slip in a word of a name: against plain distances, over the tokens of words, in parts of prompts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wisecli.routing.deciding import fuzzy_match as spelling_module
from wisecli.routing.deciding.fuzzy_match import FuzzyMatch, equal_up_to_typo, is_plain_slip
from wisecli.routing.deciding.prompt_words import (
    DIGIT,
    LETTER,
    SEPARATOR,
    TOKEN_CHARS,
    WORD_CHARS,
    split_words,
    word_of_tokens,
)
from wisecli.routing.gating.name_features import CAPITAL, NO_WORD, SMALL
from wisecli.routing.memories.subject_tensors import fuzzy_match_tensors

# One token a piece: with a space before it, and without.
PIECES = [
    "el",
    "n",
    "ne",
    "son",
    "sno",
    "man",
    "de",
    "dela",
    "dea",
    "la",
    "was",
    "born",
    "19",
    "18",
    "ab",
    "abcde",
    "borm",
]
VOCABULARY = [*PIECES, *(f" {piece}" for piece in PIECES), " ", ", "]
SPECIAL = len(VOCABULARY)


def number(letter: str) -> int:
    if letter.isdecimal():
        return DIGIT + int(letter)
    return LETTER + ord(letter) - ord("a") if letter.isalpha() else SEPARATOR


def row(text: str, width: int) -> list[int]:
    return [*map(number, text), *[0] * (width - len(text))]


def table() -> Tensor:
    return torch.tensor([*(row(text, TOKEN_CHARS) for text in VOCABULARY), row(" ", TOKEN_CHARS)], dtype=torch.uint8)


def tokens(text: str) -> list[int]:
    """A text with its tokens parted by bars; special ones are stars."""
    return [SPECIAL if part == "*" else VOCABULARY.index(part) for part in text.split("|")]


def words(texts: list[str]) -> Tensor:
    return torch.tensor([row(text, WORD_CHARS) for text in texts], dtype=torch.uint8)


def distance(own: str, said: str) -> int:
    """Damerau's distance in which no stretch is changed twice (optimal string alignment)."""
    rows = [[max(i, j) if not i or not j else 0 for j in range(len(said) + 1)] for i in range(len(own) + 1)]
    for i, j in itertools.product(range(1, len(own) + 1), range(1, len(said) + 1)):
        same = own[i - 1] == said[j - 1]
        rows[i][j] = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (not same))
        if i > 1 and j > 1 and own[i - 2 : i] == said[j - 1] + said[j - 2]:
            rows[i][j] = min(rows[i][j], rows[i - 2][j - 2] + 1)
    return rows[-1][-1]


LETTERS = st.text(alphabet="abc1", min_size=1, max_size=WORD_CHARS)


@st.composite
def slipped(draw: st.DrawFn) -> tuple[str, str]:
    """A word, and what up to two slips make of it."""
    word = draw(st.text(alphabet="abc", min_size=3, max_size=WORD_CHARS - 2))
    said = word
    for _ in range(draw(st.integers(0, 2))):
        at, letter = draw(st.integers(0, len(said) - 1)), draw(st.sampled_from("abcd1"))
        said = draw(
            st.sampled_from(
                [
                    said[:at] + letter + said[at:],
                    said[:at] + said[at + 1 :] or "a",
                    said[:at] + letter + said[at + 1 :],
                    said[:at] + said[at : at + 2][::-1] + said[at + 2 :],
                ]
            )
        )
    return word, said


@settings(deadline=None)
@given(pairs=st.lists(slipped() | st.tuples(LETTERS, LETTERS), min_size=1, max_size=8))
def test_a_slip_is_a_distance_of_one(pairs: list[tuple[str, str]]) -> None:
    near = equal_up_to_typo(*(words([pair[side] for pair in pairs]) for side in (0, 1)))
    for (own, said), close in zip(pairs, near.tolist(), strict=True):
        letters = not any(letter.isdecimal() for letter in own + said)
        free = letters and (len(own) >= 5 or (len(own) == 4 and said in twice_or_swapped(own)))
        assert close == (own == said or (free and distance(own, said) <= 1))


def twice_or_swapped(word: str) -> set[str]:
    """A word with a letter typed twice, or two neighbours that changed places."""
    twice = {word[: at + 1] + word[at:] for at in range(len(word))}
    return twice | {word[:at] + word[at + 1] + word[at] + word[at + 2 :] for at in range(len(word) - 1)}


def test_every_slip_in_a_word_is_one() -> None:
    word = "abcdef"
    said = [word[:at] + "x" + word[at:] for at in range(7)]
    said += [word[:at] + "x" + word[at + 1 :] for at in range(6)] + [word[:at] + word[at + 1 :] for at in range(6)]
    said += [word[:at] + word[at : at + 2][::-1] + word[at + 2 :] for at in range(5)]
    assert bool(equal_up_to_typo(words([word])[:, None], words(said)[None]).all())


def plain_slips(word: str) -> set[str]:
    """What becomes of a word by a slip that hardly makes another name."""
    dropped = {word[:at] + word[at + 1 :] for at in range(1, len(word) - 1)} if len(word) >= 5 else set()
    return (twice_or_swapped(word) | dropped if len(word) >= 4 else set()) - {word}


@settings(deadline=None)
@given(pair=slipped() | st.tuples(LETTERS, LETTERS))
def test_a_slip_that_makes_no_other_name_swaps_doubles_or_drops_a_letter(pair: tuple[str, str]) -> None:
    own, said = pair
    letters = not any(letter.isdecimal() for letter in own + said)
    assert bool(is_plain_slip(words([own]), words([said]))) == (letters and said in plain_slips(own))


# --- names in prompts ---

SUBJECTS = [" n|el|son| man|dela", " ab", " born| 19|18", " abcde| abcde", "", ", "]


def spelling() -> FuzzyMatch:
    return FuzzyMatch(fuzzy_match_tensors(table(), [tokens(text) if text else [] for text in SUBJECTS]))


def named(prompt: list[int], marked: list[bool] | None = None) -> list[int]:
    """The edits that a prompt names, of all of them."""
    ids, own = torch.tensor([prompt]), spelling()
    letters = own.characters(ids, torch.tensor([marked]) if marked else torch.ones_like(ids, dtype=torch.bool))
    found: list[int] = own(letters, torch.ones(1, len(SUBJECTS), dtype=torch.bool))[0].nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (" n|el|son| man|dela| was", [0]),
        ("ne|la| was", []),
        (" was| n|el|sno| man|dela", [0]),  # two letters changed places, over a border of tokens
        (" n|el|son| man|dea", [0]),  # one fewer
        (" n|el|son|n| man|dela", [0]),  # one more
        (" n|el|sno| man|dea", [0]),  # a slip in each word
        (" n|el|son| man| dela", []),  # a word in two parts
        (" n|el|son|, |man|dela", [0]),  # in any other place, with anything between
        (" man|dela| was| n|el|sno", [0]),
        (" n|el|son", []),  # half of the name
        ("n|el|son| man|dela", [0]),  # what a prompt begins with has nothing before it
        ("ab|n", []),  # short words must be as they are
        (" ab", [1]),
        (" born| 19|18", [2]),
        (" born| 19|19", []),  # and so must those with digits
        (" born|n| 19|18", [2]),  # of four letters one is typed twice
        (" borm| 19|18", []),  # another letter makes another word
        (" abcde", [3]),  # a word that a name has twice is asked for once
    ],
)
def test_a_prompt_names_a_subject_if_it_has_all_its_words_but_for_slips(prompt: str, expected: list[int]) -> None:
    assert named(tokens(prompt)) == expected


def test_what_is_not_looked_at_parts_words_as_special_and_unknown_tokens_do() -> None:
    whole = tokens(" n|el|son| man|dela")
    assert named(whole) == [0]
    for place in (2, 4):
        for stranger in (SPECIAL, 10**6, -1):
            parted = [*whole[:place], stranger, *whole[place:]]
            assert named(parted) == []
            assert named(parted, [at != place for at in range(6)]) == []
    # On either side of a whole word it does nothing.
    assert named([SPECIAL, *whole[:3], SPECIAL, *whole[3:], SPECIAL]) == [0]


def whole(
    own: FuzzyMatch, ids: Tensor, there: Tensor, rows: list[int], edits: list[int], starts: Tensor | None = None
) -> list[bool]:
    """Whether rows name an edit each by its whole name, of the tokens that are there."""
    pairs = (torch.tensor(numbers, dtype=torch.long) for numbers in (rows, edits))
    found: list[bool] = own.is_whole(own.characters(ids, there), ids, there, starts, *pairs).tolist()
    return found


@pytest.mark.parametrize(
    ("prompt", "edits", "expected"),
    [
        (" born| 19|18", [2], [True]),
        (" was| 19|18| born", [2], [True]),  # in any place
        ("ab|19|18|ab", [2], [True]),  # letters end a number as spaces do
        (" born| 19|19", [2], [False]),  # another number
        (" born| 19|18|18", [2], [False]),  # one that goes on
        (" born| 19| 18", [2], [False]),  # and one in two parts
        (" born", [2], [False]),  # none
        (" was", [0, 1, 3, 4, 5], [True] * 5),  # names without numbers want none
        (" was", [], []),
    ],
)
def test_prompts_must_have_the_numbers_of_a_subject(prompt: str, edits: list[int], expected: list[bool]) -> None:
    ids = torch.tensor([tokens(prompt) + [0] * (4 - len(tokens(prompt)))])
    there = torch.arange(4)[None] < len(tokens(prompt))
    assert whole(spelling(), ids, there, [0] * len(edits), edits) == expected


def test_numbers_are_looked_for_in_a_pairs_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spelling_module, "_AT_A_TIME", 2)
    ids = torch.tensor([tokens(" born| 19|18"), tokens(" born| 18|18"), tokens(" born| 19|18")])
    there = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    assert whole(spelling(), ids, there, [2, 0, 1, 1, 0], [2, 2, 2, 0, 0]) == [False, True, False, True, True]


WORDS = (
    *("Ana", "Ruiz", "Ruizz", "Lesser", "Senior", "Madrid", "President", "Did", "Where", "What"),
    *("is", "was", "born", "of", "to", "see", "and", "know", "who", "the", ".", ","),
)
NAMED = ["Ana Ruiz", "See of Ruiz"]


def words_of(text: str) -> list[int]:
    """A token a word, in capitals or not."""
    known = [word.lower() for word in WORDS]
    return [known.index(word.lower()) + (0 if word in WORDS else len(WORDS)) for word in text.split()]


def names_whole(ids: Tensor, there: Tensor, rows: list[int], edits: list[int]) -> list[bool]:
    """Whether rows have whole names, in a vocabulary that has each word as it is, and with the other letter first."""
    letters = [row("".join(char for char in f" {word.lower()}" if char.isalpha() or char == " "), 20) for word in WORDS]
    tensors = fuzzy_match_tensors(torch.tensor(letters * 2, dtype=torch.uint8), [words_of(name) for name in NAMED])
    kinds = [NO_WORD if word in ".," else CAPITAL if word[0].isupper() else SMALL for word in WORDS]
    other = [{CAPITAL: SMALL, SMALL: CAPITAL}.get(kind, kind) for kind in kinds]
    return whole(FuzzyMatch(tensors), ids, there, rows, edits, torch.tensor([*kinds, *other], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Where was Ana Ruiz born", True),
        ("where was ana ruiz born", True),
        ("Where was Ana Ruiz Senior born", False),  # behind the name
        ("Where was Lesser Ana Ruiz born", False),  # before it
        ("Where was Ana Senior Ruiz born", False),  # within
        ("Where was Ana Senior born", False),  # in the place of a word
        ("Where was Ana Ruizz born", True),  # a slip is none
        ("Where was Lesser Ana Ruizz born", False),
        ("Where was Ana Ruiz , Senior born", True),  # a comma ends a name
        ("Where was Ana Ruiz and Lesser Senior born", True),  # and so does a small word
        ("Lesser . Ana Ruiz was born to who", True),
        ("Did Ana Ruiz know Lesser Ana Ruiz", True),  # one of them is the name itself
        ("Lesser Ana Ruiz was born to who", True),  # a sentence begins with a capital
        ("What of President Ana Ruiz", True),  # a title is no name
        ("where was Did Ana Ruiz born", True),
        ("WHERE Was Ana Ruiz Senior Born", True),  # where all have capitals, nothing is known
        ("Where was Senior Madrid", True),  # not a word of it is there: not for this to say
    ],
)
def test_a_name_must_not_go_on(prompt: str, expected: bool) -> None:
    ids = torch.tensor([words_of(prompt)])
    assert names_whole(ids, torch.ones_like(ids, dtype=torch.bool), [0], [0]) == [expected]


def test_what_is_not_looked_at_ends_a_name() -> None:
    ids = torch.tensor([words_of("Where was Senior Ana Ruiz born"), words_of("Did Lesser see of Ruiz know who")[:6]])
    there = torch.tensor([[True] * 6, [True, False, True, True, True, True]])
    assert names_whole(ids, there, [0, 1, 1], [0, 1, 0]) == [False, True, True]
    there[0, 2] = False
    assert names_whole(ids, there, [0, 1, 1], [0, 1, 0]) == [True, True, True]


def test_only_edits_that_are_wanted_are_named() -> None:
    own, ids = spelling(), torch.tensor([tokens(" ab| abcde"), tokens(" ab| abcde")])
    letters = own.characters(ids, torch.ones_like(ids, dtype=torch.bool))
    wanted = torch.tensor([[True, True, False, False, True, True], [False, False, False, True, False, False]])
    found = own(letters, wanted)
    assert found.tolist() == [[False, True, False, False, False, False], [False, False, False, True, False, False]]
    assert not bool(own(letters, torch.zeros_like(wanted)).any())


def test_rows_are_named_as_they_are_alone_wherever_their_padding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spelling_module, "_AT_A_TIME", 2)
    prompts = [tokens(" n|el|sno| man|dela| was"), tokens(" abcde"), tokens(" was| born| 19|18| ab"), tokens("dela")]
    longest, own = max(map(len, prompts)), spelling()
    for left in (True, False):
        gaps = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * gap + prompt if left else prompt + [0] * gap for prompt, gap in zip(prompts, gaps, strict=True)]
        there = torch.tensor(
            [
                [(at >= gap) if left else (at < len(prompt)) for at in range(longest)]
                for prompt, gap in zip(prompts, gaps, strict=True)
            ]
        )
        found = own(own.characters(torch.tensor(ids), there), torch.ones(4, len(SUBJECTS), dtype=torch.bool))
        assert [one.nonzero().flatten().tolist() for one in found] == [named(prompt) for prompt in prompts]


def spoken(letters: Tensor) -> list[list[int]]:
    """The words of one row of letters, without zeros behind."""
    return [[letter for letter in word if letter] for word in split_words(letters)[0].tolist() if any(word)]


@settings(deadline=None)
@given(text=st.lists(st.integers(0, SPECIAL), min_size=1, max_size=12))
def test_words_are_those_of_the_text_that_tokens_make_up(text: list[int]) -> None:
    ids, own = torch.tensor([text]), spelling()
    whole = "".join([*VOCABULARY, " "][token] for token in text)
    expected = [[number(letter) for letter in word][:WORD_CHARS] for word in whole.replace(",", " ").split()]
    assert spoken(own.characters(ids, torch.ones_like(ids, dtype=torch.bool))) == expected


@settings(deadline=None)
@given(text=st.lists(st.integers(0, SPECIAL), min_size=1, max_size=12))
def test_each_token_is_of_the_last_word_that_it_has_letters_of(text: list[int]) -> None:
    ids, own, expected, count, within = torch.tensor([text]), spelling(), [], 0, False
    for token in text:
        of = -1
        for letter in [*VOCABULARY, " "][token]:
            word = letter.isalnum()
            count += word and not within
            within, of = word, count - 1 if word else of
        expected.append(of)
    assert word_of_tokens(own.characters(ids, torch.ones_like(ids, dtype=torch.bool)))[0].tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (" was| n|el|sno| man|dela", [1, 2, 3]),
        (" n|el|son| man|dea", [3, 4]),
        (" n|el|son| man|dela", []),
        (" n|el|son|n| man|dela", [0, 1, 2, 3]),  # a letter typed twice
        (" n|el|son| man|dela| n|el|sno", []),  # as it is, beside one that is not
        (" n|el|de| man|dela", []),  # another word
    ],
)
def test_tokens_of_misspelt_words_are_told(prompt: str, expected: list[int]) -> None:
    ids, own = torch.tensor([tokens(prompt)]), spelling()
    letters = own.characters(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    assert own.misspelt(letters, 0).nonzero().flatten().tolist() == expected


def test_no_words_make_no_tensors() -> None:
    assert fuzzy_match_tensors(table(), []) == {}
    assert fuzzy_match_tensors(table(), [(), ()]) == {}
    assert fuzzy_match_tensors(table(), [tokens(", "), [SPECIAL]]) == {}
