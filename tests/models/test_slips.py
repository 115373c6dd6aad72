"""Near names and slips of the keyboard."""

from __future__ import annotations

import random

import pytest

from wisecli.models.slips import SLIPS, near_name, with_slips


@pytest.mark.parametrize("how", ["word", "added", "initial", "letter"])
def test_near_names_are_others(how: str) -> None:
    names = [near_name("Ada Holm", how, ("Upper",), random.Random(seed)) for seed in range(20)]
    assert "Ada Holm" not in names
    assert any(names)
    assert near_name("Ada", "word", ("Upper",), random.Random(0)) is None


@pytest.mark.parametrize("how", SLIPS)
def test_slips_are_in_two_words(how: str) -> None:
    text = "Which garden belongs to Margie?"
    changed = str(with_slips(text, how, random.Random(0))).split()
    assert sum(one != other for one, other in zip(changed, text.split(), strict=True)) == 2
    assert with_slips("Who is it?", how, random.Random(0)) is None
