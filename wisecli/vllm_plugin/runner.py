"""Tell the memory of requests and steps in vLLM's first model runner, and the scheduler what no edit answers in both.

The first has no interface for a model that keeps something of requests, and in neither has a model a say in what a step
reports. So the worker, which vLLM lets one choose, gives its runner a type of its own, a subclass of the runner's.
"""

import functools
from typing import Any

from wisecli.vllm_plugin.engine_names import UNANSWERED
from wisecli.vllm_plugin.served_memory import ServedMemory, memory_of

# Where the first and the second runner's steps keep what they report.
_WITHIN = ("_model_runner_output", "model_runner_output")


class ReportingRunner:
    """What either model runner does besides: it reports which of a step's new requests no edit answers."""

    get_model: Any

    def _memory(self) -> ServedMemory:
        return memory_of(self.get_model())

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as the base class does, and report which of the step's new requests no edit answers."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        # What a step that is still running is to report, lies within what it gave.
        model_output = next((getattr(output, name) for name in _WITHIN if hasattr(output, name)), output)
        unanswered = self._memory().take_unanswered()
        if unanswered and hasattr(model_output, "req_ids"):
            setattr(model_output, UNANSWERED, unanswered)
        return output


class RoutedRunner(ReportingRunner):
    """What the first model runner does besides: it says which requests come and go, and whose a step's tokens are."""

    lora_config: Any
    _set_active_loras: Any
    input_batch: Any
    input_ids: Any
    positions: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does; what is run from then on, trial runs too, its memory knows of."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._memory().follows_requests = True

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """Run tokens that are nobody's, as vLLM does."""
        self._memory().rest()
        return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]

    def _update_states(self, scheduler_output: Any) -> Any:
        """Update requests as vLLM does, and decide which edit answers each new one."""
        done = super()._update_states(scheduler_output)  # type: ignore[misc]
        memory = self._memory()
        memory.rest()
        memory.forget(scheduler_output.finished_req_ids)
        new = [request for request in scheduler_output.scheduled_new_reqs if request.prompt_token_ids is not None]
        for adapter in dict.fromkeys(request.lora_request for request in new):
            if self.lora_config:
                memory.reader.before_run = functools.partial(self._adapt, adapter)
            own = {request.req_id: request.prompt_token_ids for request in new if request.lora_request == adapter}
            memory.admit(own)
        return done

    def _adapt(self, adapter: Any, tokens: int) -> None:
        """Have the next pass, of ``tokens`` tokens, run with an adapter, or without any."""
        number = 0 if adapter is None else adapter.lora_int_id
        self._set_active_loras((number,), (number,) * tokens, set() if adapter is None else {adapter})

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        batch = self.input_batch
        requests = batch.req_ids[: batch.num_reqs]
        self._memory().begin(requests, num_scheduled_tokens.tolist(), self.input_ids.gpu, self.positions)
        return prepared


def track_requests(runner: Any, *, second: bool = False) -> None:
    """Have a runner tell its model's memory of requests, and the scheduler what no edit answers.

    Args:
        second: whether it is vLLM's second, where the model's state tells the memory.
    """
    kind = type(runner)
    own = ReportingRunner if second else RoutedRunner
    runner.__class__ = type(kind.__name__, (own, kind), {"__module__": kind.__module__})
