import pytest
import torch
from support.drawing import normal
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.support.cosines import edit_cosines
from wisecli.routing.gating.sentence_features import (
    SENTENCE_FEATURE_COUNT,
    ends_at,
    mention_sentences,
    sentence_features,
    sentence_of,
)

END, QUESTION = torch.tensor([3, 7]), torch.tensor([7])


def parted(ends: list[int], earlier: list[bool]) -> list[list[int]]:
    """Sentences as lists of tokens: a new one begins behind an end, or where another turn begins."""
    sentences: list[list[int]] = [[]]
    for token in range(len(ends)):
        if token and ((ends[token - 1] and not ends[token]) or earlier[token] != earlier[token - 1]):
            sentences.append([])
        sentences[-1].append(token)
    return sentences


def token_by_token(cosines: list[Tensor], ends: list[int], earlier: list[bool]) -> Tensor:
    sentences = parted(ends, earlier)
    asks = [any(ends[token] == 2 for token in one) for one in sentences]
    matches = [
        [sum(max(float(head[s, t]) for s in one) for t in range(head.shape[1])) / head.shape[1] for one in sentences]
        for head in cosines
    ]
    totals = [first + second for first, second in zip(*matches, strict=True)]
    best, last = totals.index(max(totals)), len(sentences) - 1
    whole = [asks[best], best == last, best == 0, min(last + 1, 12) / 12]
    whole += [any(asks[best + 1 :]), any(asks[:best]), any(asks)]
    whole += [matches[head][place] for place in (best, last, 0) for head in range(2)]
    whole += [max([0.0, *(one for one, ask in zip(match, asks, strict=True) if ask)]) for match in matches]
    rows = []
    for number, sentence in enumerate(sentences):
        of_token = [max(-3, min(3, number - best)) / 3, number == best, asks[number], number == last, number == 0]
        rows += [[*of_token, *whole] for _ in sentence]
    return torch.tensor([[float(number) for number in row] for row in rows])


IDS = ([1], [1, 2, 1], [1, 7], [1, 3, 2, 3, 3, 5, 7, 1], [3, 3, 1, 7, 7, 2, 2, 3, 1, 1, 7, 3, 4])


@pytest.mark.parametrize("turn", [0, 2])
def test_each_token_is_placed_among_sentences_as_a_plain_loop_does(turn: int) -> None:
    """Requests of several lengths in one batch, for edits of several lengths."""
    cosines = [
        (normal(len(ids), 2 + number % 2, seed=1).tanh(), normal(len(ids), 4 - number % 3, seed=2).tanh())
        for number, ids in enumerate(IDS)
    ]
    ends = [ends_at(torch.tensor(ids), END, QUESTION) for ids in IDS]
    earlier = [[place < turn for place in range(len(ids))] for ids in IDS]
    found = sentence_features(edit_cosines(cosines), pad_sequence(ends, batch_first=True), padded_flags(earlier))
    for ids, own, end, turns, one in zip(IDS, cosines, ends, earlier, found, strict=True):
        assert end.tolist() == [2 if token == 7 else 1 if token == 3 else 0 for token in ids]
        assert one.shape[1] == SENTENCE_FEATURE_COUNT
        torch.testing.assert_close(one[: len(ids)], token_by_token(list(own), end.tolist(), turns))


def padded_flags(rows: list[list[bool]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def test_an_edit_without_a_subject_matches_by_its_relation_alone() -> None:
    ends = ends_at(torch.tensor([[1, 3, 1, 7]]), END, QUESTION)
    cosines = edit_cosines([(torch.empty(4, 0), torch.tensor([[0.1], [0.2], [0.9], [0.1]]))])
    earlier = torch.zeros(1, 4, dtype=torch.bool)
    found = sentence_features(cosines, ends, earlier)[0]
    assert found[:, 1].tolist() == [0, 0, 1, 1], "the second sentence has it best"
    assert bool(found.isfinite().all())
    assert mention_sentences(cosines, sentence_of(ends, earlier)) == [1]
