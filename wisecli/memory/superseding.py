"""Which edits of a memory give way to new ones."""

from __future__ import annotations

from collections.abc import Sequence

from wisecli.edits.record import Edit
from wisecli.edits.text import folded


def superseding(held: Sequence[Edit], new: Sequence[Edit]) -> dict[str, str]:
    """The ids of held edits that give way, each with the id of the new edit that takes its place.

    An edit gives way to one with the same prompt, or with the same id.
    """
    by_prompt = {_fact(edit): edit.id for edit in new}
    by_id = {edit.id for edit in new}
    found = {edit.id: by_prompt[_fact(edit)] for edit in held if _fact(edit) in by_prompt}
    return {**{edit.id: edit.id for edit in held if edit.id in by_id}, **found}


def _fact(edit: Edit) -> str:
    return folded(edit.prompt)
