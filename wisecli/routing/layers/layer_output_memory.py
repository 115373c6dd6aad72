"""A memory behind a decoder layer, which changes the states that leave it. Needs torch only; exports carry this.

    y = h              the main memory answers
    y = h + v_i        edit i answers

``h`` are the states that the layer gives.
"""

from typing import Any

from wisecli.routing.layers.layer_states import state_of, with_state
from wisecli.routing.memories.side_memory import Memory
from wisecli.routing.passes.routed_pass import EditedLayer, in_pass, is_off, read_here


class LayerOutputMemory(EditedLayer):
    """A decoder layer with a memory behind it; ``wise_streams`` is as :mod:`.layer_states` has it."""

    wise_memory: Memory
    wise_streams: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and add to its output the residuals of the tokens that the memory answers."""
        route = kwargs.pop("wise_route", None)
        with in_pass(route):
            output = super(EditedLayer, self).forward(*args, **kwargs)
            states = state_of(output, self.wise_streams)
            read_here(states)
            if route is None or is_off():
                return output
            chosen = self.wise_memory.choices(states, *route.at(states)).chosen
            return with_state(output, self.wise_memory.add(states, states, chosen), self.wise_streams)
