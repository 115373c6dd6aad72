"""Workers of vLLM whose model runner tells the memory of requests, and the scheduler what no edit answers."""

from typing import Any

from wisecli.vllm_plugin.runner import track_requests


class RoutedWorker:
    """What a worker does besides."""

    model_runner: Any
    use_v2_model_runner: bool

    def init_device(self) -> None:
        """Make the model runner, and have it tell the memory of requests."""
        super().init_device()  # type: ignore[misc]  # of the class behind
        track_requests(self.model_runner, second=self.use_v2_model_runner)


def __getattr__(name: str) -> Any:
    """Make a worker when it is asked for: those of other devices may not be importable."""
    if name == "RoutedCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif name == "RoutedGPUWorker":
        from vllm.v1.worker.gpu_worker import Worker as Base
    else:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    globals()[name] = worker = type(name, (RoutedWorker, Base), {"__module__": __name__})
    return worker
