"""Where the work is done: in this process, or as tasks on a Ray cluster that is there already."""

import logging
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.editing.run.job import Job, Written
from wisecli.editing.run.worker import Worker
from wisecli.errors import SettingsError, WiseError, WorkerFailedError, reason_of

RAY = "ray"
# Tasks that wait on the cluster at a time; the driver holds their results until they are written.
_AHEAD = 64
# Where Ray's client server listens, and how many seconds it may take to answer.
_PORT, _PATIENCE = 10001, 20


class Executor(Protocol):
    """Prepares a job, and writes its shards in any order."""

    def prepare(self) -> tuple[ShardDirectory, BackgroundStats]:
        """Return the plan and the statistics that all shards share."""

    def write(self, plan: ShardDirectory, unrelated: BackgroundStats, numbers: Sequence[int]) -> Iterator[Written]:
        """Yield the shards of these numbers, each as soon as it is done."""


class Local:
    """One shard after the other, in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def prepare(self) -> tuple[ShardDirectory, BackgroundStats]:
        """Return the plan and the statistics that all shards share."""
        return self.worker.prepare()

    def write(self, plan: ShardDirectory, unrelated: BackgroundStats, numbers: Sequence[int]) -> Iterator[Written]:
        """Yield the shards of these numbers, in order."""
        writer = self.worker.writer(plan, unrelated)
        for number in numbers:
            yield self.worker.write(plan, writer, number)


class OnRay:
    """One task a shard, placed and retried by Ray; the model is loaded by each.

    The base model and this package must be found on every node as they are here.
    """

    def __init__(self, ray: Any, job: Job) -> None:
        here = Path(job.model)
        device = job.load.device.split(":")[0]
        self.ray = ray
        model = str(here.absolute()) if here.exists() else job.model
        self.job = replace(job, model=model, load=replace(job.load, device=device))
        most = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
        gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        self.cpus, self.gpus = min(job.threads, most), int(gpu)

    def _task(self, function: Callable[..., Any]) -> Any:
        """Return a function as a task on the cluster, with what it needs."""
        return self.ray.remote(function).options(num_cpus=self.cpus, num_gpus=self.gpus)

    def prepare(self) -> tuple[ShardDirectory, BackgroundStats]:
        """Return the plan and the statistics that all shards share."""
        task = self._task(_prepare)
        plan, unrelated = _sound(self.ray.get(task.remote(self.job)))
        return plan, unrelated

    def write(self, plan: ShardDirectory, unrelated: BackgroundStats, numbers: Sequence[int]) -> Iterator[Written]:
        """Yield the shards of these numbers, in the order in which they are done."""
        task = self._task(_write)
        shared = [self.ray.put(value) for value in (self.job, plan, unrelated)]
        waiting = list(reversed(numbers))
        running: list[Any] = []
        try:
            while waiting or running:
                running += [
                    task.remote(*shared, waiting.pop()) for _ in range(min(len(waiting), _AHEAD - len(running)))
                ]
                ready, running = self.ray.wait(running)
                for task_id in ready:
                    number, done, content = _sound(self.ray.get(task_id))
                    yield Written(number, done, _putting(content))
        finally:
            for task_id in running:
                self.ray.cancel(task_id)


def _prepare(job: Job) -> Any:
    try:
        return Worker(job).prepare()
    except WiseError as error:  # most take more than their message, and would not arrive whole
        return WorkerFailedError(str(error), error.exit_code)


def _write(job: Job, plan: ShardDirectory, unrelated: BackgroundStats, number: int) -> Any:
    worker = Worker(job)
    try:
        written = worker.write(plan, worker.writer(plan, unrelated), number)
    except WiseError as error:
        return WorkerFailedError(str(error), error.exit_code)
    return number, written.done, _content(written)


def _content(written: Written) -> bytes:
    if written.done.entry is None:
        return b""
    with tempfile.TemporaryDirectory() as working:
        path = Path(working) / written.done.entry.file
        written.save(path)
        return path.read_bytes()


def _putting(content: bytes) -> Any:
    def save(path: Path) -> None:
        path.write_bytes(content)

    return save


def _sound(result: Any) -> Any:
    if isinstance(result, WorkerFailedError):
        raise result
    return result


def _require_answer(name: str) -> None:
    """Check that Ray answers at an address. Ray itself would wait for minutes."""
    place = urlsplit(name)
    if not place.scheme:
        return
    try:
        socket.create_connection((place.hostname or "", place.port or _PORT), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        raise SettingsError(f"--set executor={name}: no Ray answers there ({reason_of(error)})") from None


@contextmanager
def executor_for(name: str, worker: Worker) -> Iterator[Executor]:
    """Return a context with the executor of a name: ``local``, ``ray`` or ``ray://address``.

    Raises:
        SettingsError: there is none of that name, or Ray is not installed or not to be reached.
    """
    if name == "local":
        yield Local(worker)
        return
    if name != RAY and not name.startswith(f"{RAY}://"):
        raise SettingsError(f"executor must be local, ray or ray://HOST:PORT, not {name!r}")
    try:
        import ray
    except ImportError:
        raise SettingsError("--set executor=ray needs Ray; pip install 'wisecli[ray]'") from None
    # Without an address Ray goes by RAY_ADDRESS, takes a cluster that runs here, or starts one.
    address = name if name != RAY else None
    _require_answer(name)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises a dozen types where nobody answers
        raise SettingsError(f"--set executor={name}: no Ray answers there ({reason_of(error)})") from None
    try:
        yield OnRay(ray, worker.job)
    finally:
        with suppress(Exception):
            ray.shutdown()
