"""Tell the memory of requests and steps in vLLM's first model runner.

That runner has no interface for a model that keeps something of requests. So the worker, which vLLM lets one choose,
gives its runner a type of its own, a subclass of the runner's that looks at two of its steps.
"""

import functools
from collections.abc import Sequence
from typing import Any

from wisecli.vllm_plugin.engine_names import UNANSWERED
from wisecli.vllm_plugin.served_memory import ServedMemory, memory_of


class RoutedRunner:
    """What a model runner does besides: it says which requests come and go, and whose a step's tokens are."""

    get_model: Any
    lora_config: Any
    _set_active_loras: Any
    input_batch: Any
    input_ids: Any
    positions: Any
    _unanswered: Sequence[str] = ()

    def _memory(self) -> ServedMemory:
        return memory_of(self.get_model())

    def _update_states(self, scheduler_output: Any) -> Any:
        """Update requests as vLLM does, and decide which edit answers each new one."""
        done = super()._update_states(scheduler_output)  # type: ignore[misc]
        memory = self._memory()
        memory.follows_requests = True
        memory.rest()
        memory.forget(scheduler_output.finished_req_ids)
        new = [request for request in scheduler_output.scheduled_new_reqs if request.prompt_token_ids is not None]
        for adapter in dict.fromkeys(request.lora_request for request in new):
            if self.lora_config:
                memory.reader.before_run = functools.partial(self._adapt, adapter)
            own = {request.req_id: request.prompt_token_ids for request in new if request.lora_request == adapter}
            memory.admit(own)
        self._unanswered = [request.req_id for request in new if memory.is_unanswered(request.req_id)]
        return done

    def _adapt(self, adapter: Any, tokens: int) -> None:
        """Have the next pass, of ``tokens`` tokens, run with an adapter, or without any."""
        number = 0 if adapter is None else adapter.lora_int_id
        self._set_active_loras((number,), (number,) * tokens, set() if adapter is None else {adapter})

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as the base class does, and report which of the step's new requests no edit answers."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        model_output = getattr(output, "_model_runner_output", output)
        if self._unanswered and hasattr(model_output, "req_ids"):
            setattr(model_output, UNANSWERED, self._unanswered)
        return output

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        batch = self.input_batch
        requests = batch.req_ids[: batch.num_reqs]
        self._memory().begin(requests, num_scheduled_tokens.tolist(), self.input_ids.gpu, self.positions)
        return prepared


def track_requests(runner: Any) -> None:
    """Have a runner tell its model's memory of requests."""
    kind = type(runner)
    runner.__class__ = type(kind.__name__, (RoutedRunner, kind), {"__module__": kind.__module__})
