"""Texts on everyday matters and made-up facts in many wordings, which come with the package."""

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from wisecli.data.packaged import packaged_table

# Facts of each relation that are asked in every wording there is, beside so many unrelated texts.
_SUBJECTS, _TEXTS = 8, 600
# Texts of the packaged ones that stock checkpoints are measured with.
_MEASURED = 120
# Kinds of subjects that are people.
PEOPLE = ("person", "athlete", "musician")
SLOT = re.compile(r"\{(\w+)\}")


def unrelated_texts(count: int, *, seed: int) -> list[str]:
    """Return ``count`` texts on everyday matters from the package: all its prompts, then filled patterns."""
    data = packaged_table("unrelated.toml")
    prompts: list[str] = data["prompts"][:count]
    return prompts + _filled_patterns(data, range(len(prompts), count), random.Random(seed))


def texts_to_measure_with(texts: int = _MEASURED) -> list[str]:
    """Return unrelated texts that no stock checkpoint's router was fitted to."""
    return unrelated_texts(2 * _MEASURED, seed=0)[1::2][:texts]


def everyday_prompts(count: int, *, seed: int) -> list[str]:
    """Return ``count`` everyday requests to an assistant, of every kind in turn, but no questions on facts."""
    return _filled_patterns(packaged_table("everyday.toml"), range(count), random.Random(seed))


def reference_pages(count: int, *, seed: int) -> list[str]:
    """Return ``count`` pages as reference works and the web have them, of made-up names, dates and numbers."""
    rng, table, names = random.Random(seed), packaged_table("reference.toml"), packaged_table("subjects.toml")
    data = {**table, "ranges": {}, "slots": {**names, **table["slots"]}}
    return [_reference_page(data, list(names), rng) for _ in range(count)]


def _reference_page(data: dict[str, Any], kinds: list[str], rng: random.Random) -> str:
    """Return a page about a name; one that is of no kind of names has a name of any of ``kinds``."""
    page = rng.choice(list(data["pages"]))
    drawn = rng.sample(data["pages"][page], rng.randint(2, 4)) + rng.sample(data["web"], rng.randint(0, 2))
    about = rng.choice(data["slots"][page if page in kinds else rng.choice(kinds)])
    text = SLOT.sub(lambda slot: _filled(slot.group(1), data, rng), " ".join(drawn).replace("{it}", about))
    return "".join(rng.choice("0123456789") if letter == "#" else letter for letter in text)


def subjects_for(texts: int) -> int:
    """Return how many facts of each relation go with a number of unrelated texts."""
    return max(1, min(_SUBJECTS, round(_SUBJECTS * texts / _TEXTS)))


def rewordings() -> list[list[str]]:
    """Return wordings of made-up questions, of each relation several with the same one slot."""
    found: list[list[str]] = packaged_table("rewordings.toml")["facts"]
    return found


def worded(wording: str, subject: str) -> str:
    """Return a wording with a subject in its slot."""
    return SLOT.sub(lambda _: subject, wording)


def reworded_facts(subjects: int, *, seed: int) -> list[list[str]]:
    """Return ``subjects`` made-up facts a relation, each asked in every way that the package knows for it."""
    data = packaged_table("unrelated.toml")
    rng = random.Random(seed)
    facts = []
    for ways in rewordings():
        slot = SLOT.findall(ways[0])[0]
        for subject in rng.sample(data["slots"][slot], subjects):
            facts.append([worded(way, subject) for way in ways])
    return facts


@dataclass(frozen=True)
class Relation:
    """What may be asked about subjects of a ``kind``, in wordings with a slot: it ``asks`` and ``tells`` the same."""

    kind: str
    asks: tuple[str, ...]
    tells: tuple[str, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.asks, *self.tells)


def relations() -> list[Relation]:
    """Return all packaged relations."""
    return _relations("relations.toml")


def further_relations() -> list[Relation]:
    """Return further packaged relations, from which only the reader of the stock form's router learns."""
    return _relations("further_relations.toml")


def _relations(table: str) -> list[Relation]:
    rows = packaged_table(table)["relation"]
    return [Relation(row["of"], tuple(row["asks"]), tuple(row["tells"])) for row in rows]


@dataclass(frozen=True)
class Inverse:
    """A relation that can be asked back, how that is ``asked`` and ``told``, and the ``wordings`` that ask for it."""

    name: str
    wordings: tuple[str, ...]
    asked: str
    told: str


def inverses() -> list[Inverse]:
    """Return all packaged relations that one name answers either way."""
    data = packaged_table("inverses.toml")
    found = []
    for row in data["relation"]:
        framed = [frame.replace("[]", noun) for noun in row["nouns"] for frame in data["frames"]]
        found.append(Inverse(row["name"], (*framed, *row["wordings"]), row["asked"], row["told"]))
    return found


def made_up_subjects(kind: str, count: int, rng: random.Random) -> list[str]:
    """Return the names of one kind, all different; every second is like the one before, but for a few words."""
    names: list[str] = packaged_table("subjects.toml")[kind]
    found: dict[str, None] = {}
    while len(found) < count:
        name = rng.choice(names)
        found[name] = None
        if len(found) < count:
            found[_like(name, rng.choice(names), rng)] = None
    return list(found)


def _like(name: str, other: str, rng: random.Random) -> str:
    """Return a name with other digits, or with a half of it taken from another, by words or else by letters."""
    if any(letter.isdecimal() for letter in name):
        return "".join(rng.choice("0123456789") if letter.isdecimal() else letter for letter in name)
    gap = " " if min(len(name.split()), len(other.split())) > 1 else ""
    first, second = (text.split() if gap else list(text) for text in (name, other))
    if rng.random() < 0.5:
        return gap.join([*first[: (len(first) + 1) // 2], *second[(len(second) + 1) // 2 :]])
    return gap.join([*second[: len(second) // 2], *first[len(first) // 2 :]])


def _filled_patterns(data: dict[str, Any], places: range, rng: random.Random) -> list[str]:
    patterns: list[str] = data["patterns"]
    chosen = (patterns[place % len(patterns)] for place in places)
    return [SLOT.sub(lambda slot: _filled(slot.group(1), data, rng), pattern) for pattern in chosen]


def _filled(name: str, data: dict[str, Any], rng: random.Random) -> str:
    if name in data["ranges"]:
        return str(rng.randint(*data["ranges"][name]))
    return str(rng.choice(data["slots"][name]))


def capital(text: str) -> str:
    """Return a text from a capital letter on."""
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """Return a text from a small letter on."""
    return text[:1].lower() + text[1:]


@dataclass(frozen=True)
class Notes:
    """Small texts that documents are put together from; ``data/notes.toml`` says how."""

    notes: tuple[tuple[str, str], ...]
    about: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    quotes: tuple[str, ...]
    openings: tuple[str, ...]
    wants: tuple[str, ...]
    layouts: tuple[str, ...]


@cache
def notes() -> Notes:
    """Return all packaged notes."""
    rows: dict[str, Any] = packaged_table("notes.toml")
    tupled = ((name, (tuple(row) if isinstance(row, list) else row for row in values)) for name, values in rows.items())
    found: dict[str, Any] = {name: tuple(values) for name, values in tupled}
    return Notes(**found)
