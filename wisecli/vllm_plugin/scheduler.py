"""Keep what an edit's answer leaves in the attention cache apart from what other requests read.

Keys and values after a prompt's last token are functions of the tokens and of what answers them. What answers them is
a function of the tokens up to the prompt's end. So blocks of vLLM's cache that reach the end or lie after it are known
by their tokens *and by where the prompt ends*: whoever finds one has the same prompt and the same answer. Blocks before
the end are everybody's, as ever, and so are those after the end of a prompt that no edit answers, as soon as the
worker has said so.
"""

import functools
from pathlib import Path
from typing import Any

from wisecli.artifacts.former_names import current_description, current_marks
from wisecli.routing.deciding.prompt_window import TurnMarks
from wisecli.vllm_plugin.block_names import BlockNames, named_by, prompt_end
from wisecli.vllm_plugin.engine_names import UNANSWERED, description_in
from wisecli.vllm_plugin.releases import release_in


class RoutedScheduler:
    """What a scheduler of an edited model does besides: it has blocks named by where prompts end."""

    vllm_config: Any
    requests: Any
    hash_block_size: int

    def add_request(self, request: Any) -> None:
        """Take a request in, and name its blocks."""
        if request._block_hasher is not None and request.prompt_token_ids and request.request_id not in self.requests:
            self._names(request).take_over(request)
        super().add_request(request)  # type: ignore[misc]

    def _names(self, request: Any) -> BlockNames:
        """Return how a request's cache blocks are named: apart from where its prompt ends, and by release."""
        described = description_in(self.vllm_config.model_config.hf_config)
        prompt = request.prompt_token_ids
        release = release_in(Path(self.vllm_config.model_config.model))
        if current_description(described["memory"])["pooling"] == "mean":  # which answers the prompt's tokens, too
            return BlockNames(request._block_hasher, self.hash_block_size, 0, f"{named_by(prompt)} {release}")
        end = prompt_end(TurnMarks.from_dict(current_marks(described.get("marks"))), prompt)
        return BlockNames(request._block_hasher, self.hash_block_size, end, f"{end} {release}")

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in what a step gave, and which of its new requests no edit answers."""
        for request in getattr(model_runner_output, UNANSWERED, ()):
            known = self.requests.get(request)
            if known is not None and isinstance(known._block_hasher, BlockNames):
                known._block_hasher.unanswered()
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


def routed_scheduler(vllm_config: Any, **given: Any) -> Any:
    """Return vLLM's scheduler for its settings, which keeps answers apart besides."""
    if vllm_config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base
    return _kind(Base)(vllm_config=vllm_config, **given)


@functools.cache
def _kind(base: type) -> Any:
    return type(f"Routed{base.__name__}", (RoutedScheduler, base), {})
