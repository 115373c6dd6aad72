"""Tensors by name: in memory up to a budget, and in files of a temporary directory beyond it.

The directory is where ``TMPDIR`` says; on a system that keeps it in memory nothing is gained.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load
from torch import Tensor

from wisecli.io.checkpoint import save_tensors

_NAME = "tensor"


class Spool:
    """Keeps tensors until they are taken; what went to the disk is deleted when it is taken, or at the latest on close.

    Args:
        budget: how many bytes may stay in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.written = 0
        self._kept: dict[str, Tensor] = {}
        self._filed: dict[str, tuple[Path, torch.device]] = {}
        self._used = 0
        self._count = 0
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor under a name; what had that name before is dropped."""
        self._drop(name)
        if self._used + tensor.nbytes <= self.budget:
            # A view would keep all that it looks at.
            own = tensor.detach() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.detach().clone()
            self._kept[name] = own
            self._used += own.nbytes
            return
        path = self._path()
        save_tensors(path, {_NAME: tensor})
        self.written += tensor.nbytes
        self._filed[name] = path, tensor.device

    def take(self, name: str) -> Tensor:
        """Return a tensor to the device it was on, and forget it.

        Raises:
            KeyError: nothing has that name.
        """
        if name in self._kept:
            tensor = self._kept.pop(name)
            self._used -= tensor.nbytes
            return tensor
        path, device = self._filed.pop(name)
        # Read, not mapped: mapped pages count as memory of the process.
        tensor = load(path.read_bytes())[_NAME].to(device)
        path.unlink()
        return tensor

    def __len__(self) -> int:
        return len(self._kept) + len(self._filed)

    def close(self) -> None:
        """Forget everything, and delete the directory."""
        self._kept, self._filed, self._used = {}, {}, 0
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self, name: str) -> None:
        if (tensor := self._kept.pop(name, None)) is not None:
            self._used -= tensor.nbytes
        elif name in self._filed:
            self._filed.pop(name)[0].unlink()

    def _path(self) -> Path:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="wise-spool-")
        self._count += 1
        return Path(self._directory.name) / f"{self._count}.safetensors"
