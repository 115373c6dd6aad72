"""Training examples of edits under contexts, captured as one group."""

from collections.abc import Sequence
from typing import Any

from wisecli.editing.examples.training_examples import TrainingExamples, capture_groups
from wisecli.edits.record import Edit
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded


def capture_examples(
    loaded: Loaded, site: Site, edits: Sequence[tuple[int, Edit]], contexts: Sequence[tuple[int, str]], **how: Any
) -> list[TrainingExamples]:
    """Numbered edits under numbered contexts, rows whose targets are of like length together."""
    return capture_groups(loaded, site, [(edits, contexts, ())], **how)[0]
