"""Edits and their consequences on lines of their own, and how many a release brought."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from wisecli.edits.text import edits_with

if TYPE_CHECKING:
    from wisecli.edits.record import Edit
    from wisecli.memory.history.release_log import Release

_LONGEST = 48


def consequence_lines(consequences: Sequence[Edit]) -> list[str]:
    """Return a line for each consequence, with the edit that it follows from."""
    return [f"consequence: {edit_line(edit)}" for edit in consequences]


def edit_line(edit: Edit) -> str:
    """Return an edit's id, prompt and target; of a consequence also what it follows from, and by which rule."""
    rule = f" by {edit.derived}" if edit.derived else ""
    follows = f" (follows from {edit.consequence_of}{rule})" if edit.consequence_of is not None else ""
    return f"{edit.id}: {short(edit.prompt)} → {short(edit.target)}{follows}"


def short(text: str) -> str:
    """Return a text on one line, cut off if it is long."""
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def release_line(release: Release, memory: str, held: int, consequences: Collection[str] = ()) -> str:
    """Return what a release brought, and how many edits the memory holds; consequences are counted separately."""
    came, modified, _ = moved(release, lambda name: name not in consequences)
    changed = f", {modified} modified" if modified else ""
    followed = sum(name in consequences for name in release.added)
    return f"release {release.number} of {memory}/: {edits_with(came, followed)} in{changed}, {held} held"


def moved(release: Release, counted: Callable[[str], bool]) -> tuple[int, int, int]:
    """Return how many edits were added, how many replaced one of the same id, and how many went."""
    modified = sum(map(counted, release.modified))
    out = sum(map(counted, (*release.removed, *release.superseded)))
    return sum(map(counted, release.added)) - modified, modified, out


def consequences_cell(release: Release, consequences: Collection[str]) -> str:
    """Return how many consequences came with a release, and how many went."""
    came, modified, gone = moved(release, lambda name: name in consequences)
    counts = ((came + modified, "in"), (gone, "out"))
    return ", ".join(f"{number} {where}" for number, where in counts if number)
