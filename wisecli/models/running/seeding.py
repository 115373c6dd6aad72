"""Random numbers that a seed decides, and that leave those of the caller as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Return a context in which torch's generators are seeded, that of the CPU and of a GPU if ``device`` is one."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
