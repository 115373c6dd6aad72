"""Near names and slips of the keyboard."""

import random

import pytest

from wisecli.models.prompts.typos import TYPO_KINDS, near_name, with_typos


@pytest.mark.parametrize("how", ["word", "last", "added", "initial", "digits"])
def test_near_names_are_others(how: str) -> None:
    subject = {"digits": "T-100 pump", "initial": "Ada F. Holm"}.get(how, "Ada Holm")
    names = [near_name(subject, how, ("Upper",), random.Random(seed)) for seed in range(20)]
    assert subject not in names
    assert any(names)


def test_a_name_without_such_a_part_has_no_near_one() -> None:
    chance = random.Random(0)
    assert near_name("Ada", "word", ("Upper",), chance) is None
    assert near_name("Ada", "last", ("Upper",), chance) == "Ada Upper"
    assert near_name("Ada", "digits", ("Upper",), chance) is None
    assert near_name("Gravel server", "initial", ("Upper",), chance) is None
    assert str(near_name("Ada F. Holm", "initial", ("Upper",), chance)).startswith("Ada ")


@pytest.mark.parametrize("how", TYPO_KINDS)
def test_slips_are_in_two_words(how: str) -> None:
    text = "Which garden belongs to Margie?"
    changed = str(with_typos(text, how, random.Random(0))).split()
    assert sum(one != other for one, other in zip(changed, text.split(), strict=True)) == 2
    assert with_typos("Who is it?", how, random.Random(0)) is None
