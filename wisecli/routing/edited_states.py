"""The states that leave an edited decoder layer, and a memory behind it. Needs torch only; exports carry this.

    y = h              the main memory answers
    y = h + v_i        edit i answers

``h`` is what the layer gives: a tensor, or the first of several things. Of a layer that carries several streams side by
side, as (streams, B, T, d), it is the first of those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .passes import EditedLayer, in_pass, is_off, stop_if_reading
from .scores import Memory

# What a layer calls the memory behind it.
MEMORY = "wise_memory"


def state_of(output: Any) -> Tensor:
    """The states (B, T, d) in what a layer gives."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states[0] if states.dim() == 4 else states


def with_state(output: Any, state: Tensor) -> Any:
    """What a layer gives, with other states (B, T, d) in it."""
    if isinstance(output, tuple):
        return (with_state(output[0], state), *output[1:])
    return torch.cat([state[None], output[1:]]) if output.dim() == 4 else state


class EditedOutput(EditedLayer):
    """A decoder layer with a memory behind it."""

    wise_memory: Memory

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer alone, with the residuals of tokens that the memory answers."""
        route = kwargs.pop("wise_route", None)
        with in_pass(route):
            output = super(EditedLayer, self).forward(*args, **kwargs)
            states = state_of(output)
            stop_if_reading(states)
            if route is None or is_off():
                return output
            memory, inside = route.memory.to(states.device), route.inside.to(states.device)
            chosen = self.wise_memory.choices(states, memory, inside).chosen
            return with_state(output, self.wise_memory.add(states, states, chosen))
