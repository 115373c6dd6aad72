"""Finds the edits of a memory that new ones replace, and the consequences that go with them."""

from collections.abc import Collection, Mapping, Sequence

from wisecli.edits.record import Edit
from wisecli.edits.text import folded


def superseding(held: Sequence[Edit], new: Sequence[Edit]) -> dict[str, str]:
    """Return the ids of the memory's edits that are replaced, each with the id of the new edit that replaces it.

    An edit gives way to one with the same prompt, or with the same id.
    """
    by_prompt = {_fact(edit): edit.id for edit in new}
    by_id = {edit.id for edit in new}
    found = {edit.id: by_prompt[_fact(edit)] for edit in held if _fact(edit) in by_prompt}
    return {**{edit.id: edit.id for edit in held if edit.id in by_id}, **found}


def with_consequences(held: Sequence[Edit], new: Sequence[Edit], giving_way: Mapping[str, str]) -> dict[str, str]:
    """Return the replaced edits of a memory together with their consequences, by id, each with the id of what replaces
    it.

    A consequence goes with its edit, unless that comes again under its id and says the same.
    """
    before, now = {edit.id: edit for edit in held}, {edit.id: edit for edit in new}
    left = {old: by for old, by in giving_way.items() if old != by or not _same(before[old], now[by])}
    follow = {edit.id: left[edit.consequence_of] for edit in held if edit.consequence_of in left}
    return {**giving_way, **{old: by for old, by in follow.items() if old not in giving_way}}


def consequences_of(held: Sequence[Edit], ids: Collection[str]) -> tuple[str, ...]:
    """Return the ids of the consequences of some edits that are not among those edits."""
    return tuple(edit.id for edit in held if edit.consequence_of in ids and edit.id not in ids)


def _same(edit: Edit, other: Edit) -> bool:
    return (_fact(edit), edit.answer, edit.erased) == (_fact(other), other.answer, other.erased)


def _fact(edit: Edit) -> str:
    return folded(edit.prompt)
