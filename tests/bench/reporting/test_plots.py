"""What is drawn of the rows of `wise bench`."""

from typing import Any

import pytest

from wisecli.bench.reporting.plots import peak_bytes, pictures


def row(method: str, edits: int, **figures: float) -> dict[str, Any]:
    usual = {
        "reliability": 1.0,
        "generalization": 0.5,
        "locality": 1.0,
        "seconds_per_edit": 2.0,
        "bytes": 3_000_000,
        "peak_rss_bytes": 10**9,
    }
    return {"method": method, "edits": edits, "figures": {**usual, "by_age": [1.0] * edits, **figures}}


def told(picture: str, text: str) -> bool:
    """Whether a picture says some text, which stands as a comment before its letters' outlines."""
    return f"<!-- {text} -->" in picture


def test_there_is_nothing_to_draw_of_no_rows() -> None:
    assert pictures([]) == []


@pytest.mark.parametrize("counts", [(4,), (2, 4)])
def test_costs_are_seconds_and_memory_by_method_or_by_number_of_edits(counts: tuple[int, ...]) -> None:
    rows = [row(method, count) for count in counts for method in ("wise", "rag")]
    quality, ageing, cost = pictures(rows)
    assert all(told(cost, title) for title in ("seconds an edit", "MB beside the model", "peak MB"))
    assert all(told(quality, title) for title in ("reliability", "generalization", "locality"))
    assert told(ageing, "forgetting: reliability after 4 edits")
    assert told(cost, "edits") == told(quality, "edits") == (len(counts) > 1)
    assert all(told(picture, name) for picture in (quality, ageing, cost) for name in ("wise", "rag"))


def test_rows_of_one_method_are_joined_in_the_order_of_their_edits() -> None:
    rows = [row("wise", count) for count in (2, 4, 8)]
    assert pictures(rows)[0] == pictures([rows[2], rows[0], rows[1]])[0]


def test_wild_is_drawn_where_all_rows_have_it() -> None:
    wild = {"wild_as_taught": 1.0, "wild_rephrased": 0.5, "wild_locality": 1.0}
    assert told(pictures([row("wise", 4, **wild)])[0], "WILD as taught")
    assert told(pictures([row("wise", 4, **wild), row("rag", 4)])[0], "reliability")


def test_the_peak_is_the_gpus_if_there_is_one() -> None:
    assert peak_bytes({"peak_rss_bytes": 5}) == 5
    assert peak_bytes({"peak_rss_bytes": 5, "peak_vram_bytes": 3}) == 3
