"""The states in what a decoder layer gives. Needs torch only; exports carry this very file.

That is a tensor, or the first of several things. Of a layer that carries several streams side by side, as
(streams, B, T, d), the first of those is meant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def state_of(output: Any) -> Tensor:
    """The states (B, T, d) in what a layer gives."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states[0] if states.dim() == 4 else states


def with_state(output: Any, state: Tensor) -> Any:
    """What a layer gives, with other states (B, T, d) in it."""
    if isinstance(output, tuple):
        return (with_state(output[0], state), *output[1:])
    return torch.cat([state[None], output[1:]]) if output.dim() == 4 else state
