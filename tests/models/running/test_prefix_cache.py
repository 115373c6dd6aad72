from collections.abc import Callable

import pytest
import torch
from support.helpers import alone, random_rows, site_of
from support.tiny_models import tiny_model
from torch import Tensor, nn

from wisecli.models.prompts.tokenization import SHARED, Row, collate, in_batches
from wisecli.models.running.activations import capture, captured
from wisecli.models.running.hooks import hooked

BEGINNING = random_rows((12, 1))[0].prompt
# Behind the beginning: one token, a few, and more than the beginning is long, so that other rows begin behind it.
ROWS = [
    Row((*BEGINNING, *row.prompt), row.target)
    for row in random_rows((1, 2), (2, 1), (4, 3), (9, 6), (14, 2), (30, 2), (2, 5), (3, 1))
]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_what_rows_begin_with_is_read_once_and_changes_nothing(variant: str, layer: int, window: bool) -> None:
    model = tiny_model(variant)
    site, batch = site_of(model, layer), collate(ROWS)
    (shared,) = captured(model, site, [batch], labelled=True, window=window, shared=True)
    whole = capture(model, site, batch)
    expected = whole.from_window() if window else whole
    torch.testing.assert_close(shared.logits, torch.cat([alone(model, row) for row in ROWS]), **TOLERANCE)
    real = batch.mask[:, expected.first :].bool()
    assert shared.first == expected.first
    torch.testing.assert_close(shared.keys[real], expected.keys[real], **TOLERANCE)
    torch.testing.assert_close(shared.hidden[real], expected.hidden[real], **TOLERANCE)
    before = batch.mask[:, : shared.past[0][0].shape[2]].bool() if shared.past else None
    for own, other in zip(shared.past, expected.past, strict=True):
        for one, two in zip(own, other, strict=True):
            torch.testing.assert_close(one.transpose(1, 2)[before], two.transpose(1, 2)[before], **TOLERANCE)


def noting(read: list[torch.Size]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that notes the shape (rows, columns) of what a model reads."""
    return lambda _module, inputs, _output: read.append(inputs[0].shape)


def test_a_beginning_is_read_once_for_all_batches() -> None:
    model = tiny_model("llama")
    site = site_of(model, 2)
    read: list[torch.Size] = []
    with hooked(model.get_input_embeddings().register_forward_hook(noting(read))):
        list(captured(model, site, [collate(ROWS), collate(ROWS[:6])], window=True, shared=True))
    sizes = [(len(rows), collate(rows).ids.shape[1] - len(BEGINNING)) for rows in (ROWS, ROWS[:6])]
    assert [tuple(one) for one in read] == [(1, len(BEGINNING)), *sizes]


def test_few_rows_and_short_beginnings_are_read_as_they_are() -> None:
    model = tiny_model("llama")
    site = site_of(model, 2)
    read: list[torch.Size] = []
    short = [Row(row.prompt[len(BEGINNING) - SHARED + 1 :], row.target) for row in ROWS]
    with hooked(model.get_input_embeddings().register_forward_hook(noting(read))):
        list(captured(model, site, [collate(ROWS[:2]), collate(short)], window=True, shared=True))
    assert read == [collate(ROWS[:2]).ids.shape, collate(short).ids.shape]


def test_rows_that_begin_alike_are_kept_together() -> None:
    others = random_rows((15, 2), (14, 6), (33, 2), (14, 3))
    rows = [row for pair in zip(ROWS, [*others, *others], strict=True) for row in pair]
    batches = list(in_batches(rows, 4, by_beginning=True))
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert all(len({rows[index].prompt[:SHARED] == BEGINNING[:SHARED] for index in batch}) == 1 for batch in batches)


def test_rows_of_a_batch_may_be_like_in_length() -> None:
    rows = random_rows(*((length, 1) for length in (300, 2, 240, 18, 60, 3, 45, 200)))
    batches = [[len(rows[index]) for index in batch] for batch in in_batches(rows, 8, padded=False)]
    assert batches == [[3, 4, 19], [46, 61], [201, 241], [301]]
    assert len(list(in_batches(rows, 8))) == 1


def test_rows_that_fill_a_batch_are_kept_together_by_longer_beginnings() -> None:
    (first, _), (second, _) = ((row.prompt, row.target) for row in random_rows((40, 1), (40, 1)))
    rows = [Row((*first[:length], number, 1, 2), (3,)) for number in range(4) for length in (SHARED + 4, 4 * SHARED)]
    rows += [Row((*second[: 4 * SHARED], number, 1, 2), (3,)) for number in range(SHARED)]
    long = 4 * SHARED
    assert _sizes_and_beginnings(rows, 4) == [(4, SHARED + 4), (4, long), (4, long), (4, long)]
    # Four rows fill no batch of five: they are read with those that begin as they do for a while.
    assert _sizes_and_beginnings(rows, 5) == [(3, long), (3, long), (5, SHARED + 4), (5, long)]


def test_few_rows_are_kept_together_by_a_long_beginning() -> None:
    pages = [row.prompt for row in random_rows((200, 1), (200, 1), (30, 1), (30, 1))]
    rows = [Row((*page, number, 1, 2), (3,)) for page in pages for number in range(4)]
    # Those of the short pages would spare too little.
    assert _sizes_and_beginnings(rows, 32) == [(4, 200), (4, 200), (8, 0)]


def _sizes_and_beginnings(rows: list[Row], size: int) -> list[tuple[int, int]]:
    """Return how many rows each batch has, and how many tokens all of them begin with."""
    batches = [[rows[index] for index in batch] for batch in in_batches(rows, size, by_beginning=True)]
    return sorted((len(batch), _most_alike(batch)) for batch in batches)


def _most_alike(rows: list[Row]) -> int:
    """Return how many tokens all of some rows begin with."""
    columns = zip(*(row.prompt for row in rows), strict=False)
    return next((place for place, tokens in enumerate(columns) if len(set(tokens)) > 1), 0)
