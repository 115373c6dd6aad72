"""Names that vLLM knows parts of an edited model by, and its description in a config. Needs nothing of vLLM."""

from collections.abc import Mapping
from typing import Any, cast

from wisecli.io.checkpoint import EXPORTED_KEY

# What architectures of edited checkpoints begin with.
PREFIX = "Wise"
# The operator that adds residuals, and what it finds the memory by.
LIBRARY, OPERATOR = "wise", "add_residuals"
OP = f"{LIBRARY}::{OPERATOR}"
LAYER = "wise.memory"
# What a step's output says which new requests no edit answers by.
UNANSWERED = "wise_unanswered"


def description_in(config: Any) -> Mapping[str, Any]:
    """Return what a checkpoint's config says of its side memory.

    Raises:
        ValueError: the checkpoint holds none.
    """
    described = getattr(config, EXPORTED_KEY, None)
    if described is None:
        raise ValueError("this checkpoint's config describes no side memory; write it anew with `wise export`")
    return cast(Mapping[str, Any], described)
