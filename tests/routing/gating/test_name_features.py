import pytest
import torch
from support.drawing import normal
from torch import Tensor
from torch.nn import functional as F

from tests.support.cosines import edit_cosines
from wisecli.routing.gating.name_features import NAME_FEATURE_COUNT, name_features, starts_of

# Marks of tokens: no word, a small one, one with a capital, and such as go on with a word.
NO_WORD, SMALL, CAPITAL, WITHIN, CAPITAL_WITHIN = range(5)


def words_of(starts: list[int], opens: list[bool]) -> list[list[int]]:
    words: list[list[int]] = []
    for token, start in enumerate(starts):
        goes_on = token > 0 and start >= WITHIN and starts[token - 1] != NO_WORD and not opens[token]
        if goes_on:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def word_by_word(cosines: list[Tensor], starts: list[int], ends: list[int], earlier: list[bool]) -> Tensor:
    opens = [
        token == 0 or bool(ends[token - 1]) or earlier[token] != earlier[token - 1] for token in range(len(starts))
    ]
    words = words_of(starts, opens)
    capital = [starts[word[0]] in (CAPITAL, CAPITAL_WITHIN) for word in words]
    nothing = torch.zeros(len(starts), NAME_FEATURE_COUNT)
    within = [starts[word[0]] for word in words if not opens[word[0]] and starts[word[0]] != NO_WORD]
    if not within or sum(start in (SMALL, WITHIN) for start in within) < 0.2 * len(within):
        return nothing
    subject = [max(float(cosines[0][token].max()) for token in word) for word in words]
    named = [is_capital or found > 0.7 for is_capital, found in zip(capital, subject, strict=True)]
    runs: list[list[int]] = []
    for word, is_named in enumerate(named):
        if is_named and (word == 0 or not named[word - 1]):
            runs.append([])
        if is_named:
            runs[-1].append(word)
    size = cosines[0].shape[1]

    def match(run: list[int]) -> float:
        tokens = [token for word in run for token in words[word]]
        return sum(max(float(cosines[0][token, t]) for token in tokens) for t in range(size)) / size

    best = max(runs, key=match) if runs else []
    explained = [
        1.0 if opens[words[word][0]] else max(float(max(one[token].max() for one in cosines)) for token in words[word])
        for word in best
    ] or [1.0]
    few = min(3, sum(one < 0.5 for one in explained)) / 3
    whole = [match(best) if best else -1.0, min(explained), explained[0], explained[-1], few, min(6, len(best)) / 6]
    rows = {token: [capital[word], word in best, *whole] for word, own in enumerate(words) for token in own}
    return torch.tensor([[float(number) for number in rows[token]] for token in range(len(starts))])


@pytest.mark.parametrize(
    "starts",
    [
        [SMALL],
        [CAPITAL, SMALL, SMALL],
        [CAPITAL_WITHIN, SMALL, CAPITAL, WITHIN, SMALL, CAPITAL, CAPITAL_WITHIN, NO_WORD],
        [SMALL, NO_WORD, CAPITAL_WITHIN, WITHIN, NO_WORD, SMALL, CAPITAL, SMALL, SMALL, CAPITAL, WITHIN, NO_WORD],
        [CAPITAL, CAPITAL, SMALL],
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("turn", [0, 2])
def test_names_are_looked_at_as_a_plain_loop_does(starts: list[int], seed: int, turn: int) -> None:
    ends = [int(place % 4 == 3) for place in range(len(starts))]
    cosines = [normal(len(starts), 3, seed=seed).tanh(), normal(len(starts), 4, seed=seed + 9).tanh()]
    earlier = [place < turn for place in range(len(starts))]
    longer, rest = [SMALL, CAPITAL] * 8, 16 - len(starts)
    among = [normal(16, 2, seed=seed + 4).tanh(), normal(16, 5, seed=seed + 5).tanh()]
    marks = [
        torch.tensor([F.pad(torch.tensor(one), (0, rest)).tolist(), other])
        for one, other in ((starts, longer), (ends, [0] * 16), (earlier, [False] * 16))
    ]
    found = name_features(edit_cosines([cosines, among]), *marks)
    torch.testing.assert_close(found[0, : len(starts)], word_by_word(cosines, starts, ends, earlier))
    torch.testing.assert_close(found[1], word_by_word(among, longer, [0] * 16, [False] * 16))


def alone(cosines: list[Tensor], starts: Tensor) -> Tensor:
    nothing = torch.zeros(1, len(starts), dtype=torch.long)
    return name_features(edit_cosines([cosines]), starts[None], nothing, nothing.bool())[0]


def test_a_name_that_goes_on_has_a_word_that_nothing_explains() -> None:
    """Who is Ana Ruiz ( Senior ) ?, of which the subject is Ana Ruiz."""
    starts = torch.tensor([CAPITAL_WITHIN, SMALL, CAPITAL, CAPITAL, WITHIN, CAPITAL, NO_WORD])
    subject = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.9, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.3], [0.0, 0.0]])
    relation = torch.tensor([[0.9], [0.8], [0.1], [0.1], [0.1], [0.2], [0.9]])
    longer = alone([subject, relation], starts)
    assert longer[0, 3:].tolist() == pytest.approx([0.3, 0.9, 0.3, 1 / 3, 0.5])
    assert longer[:, 1].tolist() == [0, 0, 1, 1, 1, 1, 0]
    kept = torch.tensor([0, 1, 2, 3, 4, 6])
    same = alone([subject[kept], relation[kept]], starts[kept])
    assert same[0, 3:].tolist() == pytest.approx([0.9, 0.9, 0.9, 0, 2 / 6])


def test_tokens_beyond_the_vocabulary_begin_as_its_last_one() -> None:
    assert starts_of(torch.tensor([0, 2, 9]), torch.tensor([2, 0, 1], dtype=torch.uint8)).tolist() == [2, 1, 1]
