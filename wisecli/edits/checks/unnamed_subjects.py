"""Tells which edits name no subject, so that they may answer the same question about another one."""

from collections.abc import Sequence

from wisecli.edits.record import Edit, Numbered
from wisecli.progress import NOTE, Event, ProgressCallback

# Lines that one warning lists.
_MAX_LINES = 8


def names_its_subject(edit: Edit) -> bool:
    """Return whether the subject of an edit, stated or found, stands in its prompt."""
    return edit.subject_name is not None and edit.subject_name.casefold() in edit.prompt.casefold()


def warn_of_unnamed_subjects(name: str, numbered: Sequence[Numbered], on_progress: ProgressCallback) -> None:
    """Report the lines of a file whose edits name no subject, if there are any, with what that means and what to do.

    Args:
        name: the name of the file that the edits are from.
    """
    lines = list(dict.fromkeys(line for line, edit in numbered if not names_its_subject(edit)))
    if not lines:
        return
    listed = ", ".join(map(str, lines[:_MAX_LINES]))
    more = f" and {len(lines) - _MAX_LINES} more" if len(lines) > _MAX_LINES else ""
    edits = "an edit" if len(lines) == 1 else f"{len(lines)} edits"
    on_progress(
        Event(
            NOTE,
            note=f"warning: {name}:{listed}{more}: the prompt of {edits} names no subject, so that the same question "
            "about another one may be answered, and fewer rewordings are; state it as `subject`, as the prompt "
            "writes it",
        )
    )
