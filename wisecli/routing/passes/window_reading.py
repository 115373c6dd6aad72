"""Windows that a model is running, for a memory to decide. Needs torch only; exports carry this very file.

A memory reads the states of one layer. Of one with a deep gate windows are run on to that gate's layer, unless what is
known by then refuses every edit.
"""

import torch
from torch import Tensor

from wisecli.routing.deciding.decision import Decision, WindowStates
from wisecli.routing.deciding.fact_candidates import Candidates
from wisecli.routing.deciding.fact_decision import FactDecision
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.memories.side_memory import Memory


class DecidedError(Exception):
    """Ends the run of windows at a layer that is read, carrying what was decided there."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


class WindowReading:
    """Takes the states of the layers that a memory reads, one layer after the other, until it has decided.

    Args:
        memory: which reads them.
        ids: tokens of windows (B, W).
        non_padding: which of them are no padding (B, W).
    """

    def __init__(self, memory: Memory, ids: Tensor, non_padding: Tensor) -> None:
        self._memory, self._ids, self._non_padding = memory, ids, non_padding
        self._candidates: Candidates | None = None

    def take(self, states: Tensor) -> Decision | None:
        """Return the decision; ``None`` if the states of the gate's layer are wanted as well.

        Args:
            states: what leaves the next of the layers that are read (B, W, d).
        """
        memory = self._memory
        with torch.autocast(states.device.type, enabled=False):
            if not isinstance(memory, FactDecision) or memory.deep_gate is None:
                return memory.decide(WindowStates(self._ids, self._non_padding, states))
            if self._candidates is not None:
                return memory.asked(self._candidates, states.to(self._candidates.window.states))
            candidates = memory.candidates(WindowStates(self._ids, self._non_padding, states))
            decision = memory.asked(candidates)
            if not bool((decision.memory != UNROUTED).any()):
                return decision
            self._candidates = candidates
            return None
