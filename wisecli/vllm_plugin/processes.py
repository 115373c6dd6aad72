"""What the processes that a model is cut among tell each other, so that all of them serve the same release."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Processes:
    """How one process learns of the others; by default there are none (:data:`ALONE`).

    ``first`` returns what the first process has for a value, ``all_of`` whether something holds in every one. All
    processes must ask in the same order.
    """

    first: Callable[[str | None], str | None] = _same
    all_of: Callable[[bool], bool] = _same


ALONE = Processes()


def tensor_parallel_processes() -> Processes:
    """Return those that a model's tensors are cut among, in vLLM."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return ALONE

    def all_of(holds: bool) -> bool:
        held = torch.tensor(int(holds))
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MIN, group.cpu_group)
        return bool(held)

    return Processes(group.broadcast_object, all_of)
