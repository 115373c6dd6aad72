"""Settings by which a tiny model is edited in a fraction of the time."""

import pytest


def edit_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let edits read little unrelated text, and residuals stop at a loss that tiny models come to soon."""
    patch.setenv("WISE_UNRELATED_TEXTS", "16")
    patch.setenv("WISE_RESIDUAL_STOP", "0.2")
