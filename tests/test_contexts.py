from __future__ import annotations

import re
import sys
from importlib import resources
from typing import Any

import pytest

from wisecli.contexts import unrelated_texts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA: dict[str, Any] = tomllib.loads(
    resources.files("wisecli").joinpath("data/unrelated.toml").read_text(encoding="utf-8")
)
PROMPTS: list[str] = DATA["prompts"]


def matcher(pattern: str) -> re.Pattern[str]:
    """What a pattern may become: a word of the right list, or a number of the right range, in each slot."""
    ranges = {name: [str(number) for number in range(low, high + 1)] for name, (low, high) in DATA["ranges"].items()}
    allowed = {**DATA["slots"], **ranges}
    parts = re.split(r"\{(\w+)\}", pattern)
    parts[0::2] = map(re.escape, parts[0::2])
    parts[1::2] = ("(?:" + "|".join(map(re.escape, allowed[name])) + ")" for name in parts[1::2])
    return re.compile("".join(parts))


@pytest.mark.parametrize("count", [0, 1, len(PROMPTS) - 1, len(PROMPTS), len(PROMPTS) + 1, 600])
def test_there_are_as_many_texts_as_asked_for(count: int) -> None:
    texts = unrelated_texts(count, seed=0)
    assert len(texts) == count
    assert all(text.strip() for text in texts)


def test_all_written_prompts_come_first_and_never_depend_on_the_seed() -> None:
    for seed in (0, 1):
        assert unrelated_texts(len(PROMPTS) + 10, seed=seed)[: len(PROMPTS)] == PROMPTS
    assert unrelated_texts(7, seed=0) == PROMPTS[:7]


def test_the_rest_are_patterns_with_every_slot_filled_from_its_own_list_or_range() -> None:
    count = len(PROMPTS) + 3 * len(DATA["patterns"])
    matchers = {pattern: matcher(pattern) for pattern in DATA["patterns"]}
    used: set[str] = set()
    for text in unrelated_texts(count, seed=0)[len(PROMPTS) :]:
        fitting = [pattern for pattern, one in matchers.items() if one.fullmatch(text)]
        assert fitting, text
        used.update(fitting)
    assert used == set(matchers)


def test_the_seed_decides_the_texts() -> None:
    first, again, other = (unrelated_texts(300, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("count", [50, 130, 299])
def test_fewer_texts_are_the_beginning_of_more(count: int) -> None:
    assert unrelated_texts(count, seed=5) == unrelated_texts(300, seed=5)[:count]


def test_the_texts_given_are_the_callers_own() -> None:
    unrelated_texts(3, seed=0).clear()
    assert unrelated_texts(3, seed=0) == PROMPTS[:3]


def test_most_texts_differ_from_each_other() -> None:
    texts = unrelated_texts(600, seed=0)
    assert len(set(texts)) > 0.9 * len(texts)
