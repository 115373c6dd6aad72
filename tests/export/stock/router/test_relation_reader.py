import math

import pytest
import torch
from support.drawing import normal
from torch import Tensor

from wisecli.export.stock.router.relation_reader import ReaderSizes, RelationReader
from wisecli.export.stock.text_states import Rotation

SIZES = ReaderSizes(hidden=12, features=6, neurons=10, components=4, groups=2, heads=3, head_dim=8, code=5)
LENGTH = 7


@pytest.fixture
def reader() -> RelationReader:
    torch.manual_seed(0)
    found = RelationReader(SIZES).eval()
    states, inverse = normal(200, 12, seed=1), normal(200, seed=2).abs() + 0.1
    found.fit_to(states, inverse)
    return found


def rotation() -> Rotation:
    angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    doubled = torch.cat([angles, angles], -1)
    return Rotation(doubled.cos(), doubled.sin(), 0.3)


def turned(vector: Tensor, place: int) -> Tensor:
    """A vector of one head, its pairs rotated as far as a place says."""
    found = vector.clone()
    for pair in range(4):
        angle = place * 100.0 ** (-pair / 4)
        x, y = float(vector[pair]), float(vector[pair + 4])
        found[pair] = x * math.cos(angle) - y * math.sin(angle)
        found[pair + 4] = y * math.cos(angle) + x * math.sin(angle)
    return found


def plainly(reader: RelationReader, features: Tensor, there: list[int], column: int) -> Tensor:
    """What attention finds at one column, head by head and place by place."""
    heads = []
    for group in range(SIZES.groups):
        own = slice(group * SIZES.head_dim, (group + 1) * SIZES.head_dim)
        keys = {place: turned(reader.keys(features[place])[own], place) for place in there if place <= column}
        for head in range(SIZES.heads):
            query = turned(reader.queries[group, head], column)
            scores = {place: math.exp(0.3 * float(query @ key)) for place, key in keys.items()}
            values = [reader.values(features[place])[own] * score for place, score in scores.items()]
            heads.append(torch.stack(values).sum(0) / sum(scores.values()))
    found: Tensor = reader.output(torch.cat(heads))
    return found


@torch.no_grad()
def test_pooling_is_plain_attention(reader: RelationReader) -> None:
    features, columns = normal(3, LENGTH, 10, seed=3), torch.tensor([6, 4, 2])
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, [0, 3]] = False
    codes, asked = reader.pooled(features[mask], mask, columns, rotation())
    for row, column in enumerate(columns.tolist()):
        wanted = plainly(reader, features[row], mask[row].nonzero()[:, 0].tolist(), column)
        torch.testing.assert_close(torch.cat([codes[row], asked[row, None]]), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_masked_or_stands_behind_counts_for_nothing(reader: RelationReader) -> None:
    features, columns = normal(1, LENGTH, 10, seed=3), torch.tensor([4])
    mask = torch.ones(1, LENGTH, dtype=torch.bool).index_fill(1, torch.tensor([1]), False)
    changed = features.clone()
    changed[0, [1, 5, 6]] = 9.0
    one, other = (reader.pooled(given[mask], mask, columns, rotation())[0] for given in (features, changed))
    assert torch.equal(one, other)
    changed[0, 2] = 9.0
    assert not torch.equal(one, reader.pooled(changed[mask], mask, columns, rotation())[0])


@torch.no_grad()
def test_components_are_the_principal_ones(reader: RelationReader) -> None:
    states = normal(200, 12, seed=1)
    read = reader.token_features(states, torch.ones(200))[:, SIZES.features :]
    assert read.mean(0).abs().max() < 1e-5
    spread = read.T @ read / 200
    assert (spread - spread.diagonal().diag()).abs().max() < 1e-4
    assert bool((spread.diagonal().diff() <= 1e-5).all())
    assert float(reader.gain) == pytest.approx(1 / float((normal(200, seed=2).abs() + 0.1).median()))


@torch.no_grad()
def test_features_grow_with_the_norms_factor_and_components_do_not(reader: RelationReader) -> None:
    states = normal(5, 12, seed=4)
    once, twice = (reader.token_features(states, torch.full((5,), factor)) for factor in (0.5, 1.0))
    torch.testing.assert_close(2 * once[:, : SIZES.features], twice[:, : SIZES.features])
    assert torch.equal(once[:, SIZES.features :], twice[:, SIZES.features :])


@torch.no_grad()
def test_odds_say_how_near_a_code_is_and_whether_anything_is_asked(reader: RelationReader) -> None:
    relations = torch.eye(5)[:2]
    found = reader.odds(torch.eye(5)[:1] * 3, torch.tensor([0.5]), relations)
    torch.testing.assert_close(found, torch.tensor([[2.0 * 3 + 0.5 - 4.0, 0.5 - 4.0]]))
