"""What only `pytest --thorough` runs."""

from collections.abc import Container, Iterable
from typing import Any

import pytest
from hypothesis import settings

# The files that take longest, longest first: nobody shall begin one when all others are done. The first makes the
# chain of the real model, the next three do without it, and those that need it later find it made.
LONGEST = (
    "export/test_behaviour.py",
    "run/test_staging.py",
    "passes/test_routed_pass.py",
    "examples/test_erasure.py",
    "routed/test_checkpoint.py",
    "evidence/test_separators.py",
    "streaming/test_layer_stream.py",
    "running/test_shrinking_batches.py",
    "export/test_compatibility.py",
    "history/test_release_log.py",
    "bench/test_compare.py",
    "routing/test_router.py",
    "bench/test_going_on.py",
    "bench/test_editing_run.py",
    "edit/test_reproduce.py",
    "models/test_vision.py",
    "export/test_behind_layers.py",
    "cli/test_shards.py",
    "bench/studies/test_studies.py",
    "commands/test_copies.py",
    "evaluation/test_evaluate.py",
    "layout/test_layout_inference.py",
    "cli/test_app.py",
    "scripts/test_publishing.py",
    "commands/test_two_writers.py",
    "commands/test_kills.py",
)


def few(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """All values as parameters (a tuple is several), those that are not among the quick ones with --thorough only."""
    return [value if value in quick else _marked(value) for value in values]


def _marked(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)


def examples(small: int, full: int) -> int:
    """How many examples hypothesis tries: the small number, under --thorough the full one."""
    return full if settings.get_current_profile_name() == "thorough" else small


def place_in_order(item: pytest.Item) -> int:
    """Where a test's file stands among the longest; behind them all if it is none of them."""
    file = "/".join(item.path.parts[-3:])
    return next((place for place, name in enumerate(LONGEST) if file.endswith(name)), len(LONGEST))
