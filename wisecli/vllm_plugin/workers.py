"""Workers of vLLM whose first model runner tells the memory of requests."""

from __future__ import annotations

from typing import Any

from wisecli.vllm_plugin.runner import watch


def __getattr__(name: str) -> Any:
    """Make a worker when it is asked for: those of other devices may not be imported."""
    if name == "RoutedCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif name == "RoutedGPUWorker":
        from vllm.v1.worker.gpu_worker import Worker as Base
    else:
        raise AttributeError(f"module {__name__} has no attribute {name}")

    def init_device(self: Any) -> None:
        """Make the model runner, and have it tell the memory of requests."""
        super(worker, self).init_device()
        watch(self.model_runner)

    worker = type(name, (Base,), {"init_device": init_device, "__module__": __name__})
    globals()[name] = worker
    return worker
