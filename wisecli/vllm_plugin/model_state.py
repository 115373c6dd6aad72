"""Tell the memory of requests and steps in vLLM's second model runner, by the interface it has for that.

A request that was preempted comes in again, with what it has generated after its prompt; the prompt is told apart.
"""

import functools
from typing import Any

from wisecli.vllm_plugin.served_memory import ServedMemory, memory_of


class RoutedState:
    """What the state of an edited model does besides: it says which requests come and go, and whose tokens run."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._new: dict[str, Any] = {}
        self._memory.follows_requests = True

    @property
    def _memory(self) -> ServedMemory:
        return memory_of(self.model)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Take in a request; those of a step are decided together, in :meth:`apply_staged_writes`."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        if new_req_data.prompt_token_ids is not None:
            self._new[new_req_data.req_id] = new_req_data.prompt_token_ids

    def remove_request(self, req_id: str) -> None:
        """Forget a request."""
        super().remove_request(req_id)  # type: ignore[misc]
        self._new.pop(req_id, None)
        self._memory.forget([req_id])

    def apply_staged_writes(self) -> None:
        """Decide the requests that came in."""
        super().apply_staged_writes()  # type: ignore[misc]
        new, self._new = self._new, {}
        self._memory.admit(new)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Note what is routed of the step that begins."""
        counts = input_batch.num_scheduled_tokens[: input_batch.num_reqs].tolist()
        self._memory.begin(
            input_batch.req_ids[: input_batch.num_reqs], counts, input_batch.input_ids, input_batch.positions
        )
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
        """Note that no token of a trial run is routed."""
        self._memory.rest()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]


@functools.cache
def state_class(base: Any) -> Any:
    """Return a state that does what a class of vLLM's does, and tells the memory."""
    return type(f"Routed{base.__name__}", (RoutedState, base), {})
