"""Texts on everyday matters and made-up facts in many wordings, which come with the package."""

from __future__ import annotations

import random
import re
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if TYPE_CHECKING:
    pass


# Facts of each relation that are asked in every wording there is, beside so many unrelated texts.
_SUBJECTS, _TEXTS = 8, 600


_SLOT = re.compile(r"\{(\w+)\}")


def unrelated_texts(count: int, *, seed: int) -> list[str]:
    """Texts on everyday matters that come with the package: all its prompts, then filled patterns, ``count`` in all."""
    data = _packaged("unrelated.toml")
    chance = random.Random(seed)
    texts: list[str] = data["prompts"][:count]
    while len(texts) < count:
        pattern = data["patterns"][len(texts) % len(data["patterns"])]
        texts.append(_SLOT.sub(lambda slot: _filled(slot.group(1), data, chance), pattern))
    return texts


def subjects_for(texts: int) -> int:
    """How many facts of each relation go with so many unrelated texts."""
    return max(1, min(_SUBJECTS, round(_SUBJECTS * texts / _TEXTS)))


def reworded_facts(subjects: int, *, seed: int) -> list[list[str]]:
    """Made-up facts, each asked in every way the package knows for its relation; ``subjects`` facts a relation."""
    data = _packaged("unrelated.toml")
    chance = random.Random(seed)
    facts = []
    for ways in _packaged("rewordings.toml")["facts"]:
        slot = _SLOT.findall(ways[0])[0]
        for subject in chance.sample(data["slots"][slot], subjects):
            facts.append([_SLOT.sub(subject, way) for way in ways])
    return facts


def _packaged(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("wisecli").joinpath("data", name).read_text(encoding="utf-8"))


def _filled(name: str, data: dict[str, Any], chance: random.Random) -> str:
    if name in data["ranges"]:
        return str(chance.randint(*data["ranges"][name]))
    return str(chance.choice(data["slots"][name]))
