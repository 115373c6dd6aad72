"""Finds the states in a decoder layer's output. Needs torch only; exports carry this very file.

That is a tensor, or the first of several things. Of a layer that carries several streams side by side the first of
those is read, and what is added to it is added to all; ``streams`` is the axis along which they lie, ``None`` where
there is one: (B, T, d).
"""

from typing import Any

from torch import Tensor

# What a layer calls the memory behind it.
MEMORY = "wise_memory"


def state_of(output: Any, streams: int | None) -> Tensor:
    """Return the states (B, T, d) in a layer's output."""
    states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return states if streams is None else states.select(streams, 0)


def with_state(output: Any, state: Tensor, streams: int | None) -> Any:
    """Return a layer's output with other states (B, T, d) in it."""
    if isinstance(output, (tuple, list)):
        changed = [with_state(output[0], state, streams), *output[1:]]
        return output._make(changed) if hasattr(output, "_make") else type(output)(changed)
    return state if streams is None else output + (state - state_of(output, streams)).unsqueeze(streams)
