"""What a long run tells whoever watches it; the console turns it into bars and lines."""

from collections.abc import Callable
from dataclasses import dataclass

# The stage of an event that is no stage: its note is a sentence for whoever watches.
NOTE = "note"


@dataclass(frozen=True)
class Event:
    """A stage is at ``done`` of ``total`` steps; ``note`` says what was measured there."""

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""


ProgressCallback = Callable[[Event], None]


def ignore_progress(_event: Event) -> None:
    """Do nothing with an event."""
