"""The warning of edits that name no subject."""

from wisecli.edits.checks.unnamed_subjects import names_its_subject, warn_of_unnamed_subjects
from wisecli.edits.record import Edit
from wisecli.progress import NOTE, Event

NAMED = Edit("a", "Who leads Norland?", "Ana")
UNNAMED = Edit("b", "who leads norland?", "Ana")


def test_the_subject_must_stand_in_the_prompt_in_any_case() -> None:
    assert names_its_subject(NAMED)
    assert names_its_subject(Edit("c", "who leads norland?", "Ana", subject="Norland"))
    assert not names_its_subject(UNNAMED)
    assert not names_its_subject(Edit("c", "who leads norland?", "Ana", subject="Sudland"))


def test_lines_without_a_subject_are_listed_once() -> None:
    events: list[Event] = []
    warn_of_unnamed_subjects("edits.jsonl", [(1, NAMED)], events.append)
    assert not events
    warn_of_unnamed_subjects("edits.jsonl", [(1, NAMED), (2, UNNAMED), (2, UNNAMED)], events.append)
    warn_of_unnamed_subjects("edits.jsonl", [(line, UNNAMED) for line in range(1, 13)], events.append)
    assert [event.stage for event in events] == [NOTE, NOTE]
    assert "edits.jsonl:2: the prompt of an edit names no subject" in events[0].note
    assert "edits.jsonl:1, 2, 3, 4, 5, 6, 7, 8 and 4 more: the prompt of 12 edits" in events[1].note
