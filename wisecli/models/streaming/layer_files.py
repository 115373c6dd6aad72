"""Where a checkpoint keeps the parameters of a decoder layer, and how they are read into one buffer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from wisecli.errors import DamagedFileError, ModelError
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.safetensors_header import Header, read_header
from wisecli.models.layout.architectures import stored_name

# Kernels read their operands in lines of so many bytes.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Stored:
    """A tensor: where its numbers lie in which file, and where they go in the buffer of its layer."""

    name: str
    path: Path
    start: int
    stored: torch.dtype
    dtype: torch.dtype
    shape: torch.Size
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Size in the buffer."""
        return self.shape.numel() * self.dtype.itemsize

    def entry(self, number: int) -> "Stored":
        """Return where one of the entries along the first axis lies."""
        shape = self.shape[1:]
        return replace(self, start=self.start + number * shape.numel() * self.stored.itemsize, shape=shape)


# Where parameters lie, by their names: the file, and what they are called in it.
Places = Mapping[str, tuple[Path, str]]


class LayerFiles:
    """The files that hold a model's layers.

    Args:
        places: of parameters that do not lie in the checkpoint, or not by their own names.
    """

    def __init__(self, checkpoint: Checkpoint, places: Places) -> None:
        self.checkpoint, self.places = checkpoint, places
        self._headers: dict[Path, Header] = {}

    def tensor(self, name: str, dtype: torch.dtype) -> Stored:
        """Return where a tensor of the checkpoint lies, to be read in a type."""
        return self._stored(name, self.checkpoint.directory / self.checkpoint.file_of(name), name, dtype)

    def parameter(self, name: str, parameter: Tensor) -> Stored:
        """Return where a parameter lies.

        Raises:
            ModelError: it is not there as the model has it.
        """
        file, spelling = self.places.get(name) or self._in_checkpoint(name)
        found = self._header(file).tensors.get(spelling)
        if found is None or found.shape != tuple(parameter.shape):
            raise ModelError(
                f"{self.checkpoint.directory}: the checkpoint does not hold {name} as the model has it, "
                "so its layers cannot be streamed; leave out the memory budget"
            )
        return self._stored(name, file, spelling, parameter.dtype)

    def layer(self, path: str, layer: nn.Module, without: Collection[str]) -> list[Stored]:
        """Return where a layer's parameters lie and where they go, in the order in which the files have them.

        Args:
            without: names of parameters that are left out.
        """
        wanted = [(name, parameter) for name, parameter in layer.named_parameters() if name not in without]
        found = [replace(self.parameter(f"{path}.{name}", parameter), name=name) for name, parameter in wanted]
        parts, offset = [], 0
        for part in sorted(found, key=lambda part: (part.path, part.start)):
            parts.append(replace(part, offset=offset))
            offset += aligned(part.bytes)
        return parts

    def _in_checkpoint(self, name: str) -> tuple[Path, str]:
        """Return the file that a parameter lies in, or any, and what it is called there."""
        spelling = stored_name(self.checkpoint, name)
        if spelling is None:
            return self.checkpoint.files[0], name
        return self.checkpoint.directory / self.checkpoint.file_of(spelling), spelling

    def _stored(self, name: str, file: Path, spelling: str, dtype: torch.dtype) -> Stored:
        header = self._header(file)
        layout = header.tensors[spelling]
        own = getattr(torch, layout.dtype)
        return Stored(name, file, header.starts[spelling], own, dtype, torch.Size(layout.shape))

    def _header(self, file: Path) -> Header:
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]


def aligned(size: int) -> int:
    """Return a number of bytes rounded up, so that what lies after them begins where kernels read it best."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def buffer_size(parts: Sequence[Stored]) -> int:
    """Return the bytes of the buffer that holds a layer."""
    return parts[-1].offset + parts[-1].bytes


def read_into(part: Stored, target: Tensor) -> int:
    """Read a tensor into its place (bytes,), in its own type, and return how much was read."""
    same = part.stored == part.dtype
    raw = target if same else torch.empty(part.shape.numel() * part.stored.itemsize, dtype=torch.uint8)
    left = memoryview(raw.numpy().data)
    with part.path.open("rb", buffering=0) as stream:
        stream.seek(part.start)
        while left:
            count = stream.readinto(left)
            if not count:
                raise DamagedFileError(part.path, "it became shorter while it was read", "copy the checkpoint anew")
            left = left[count:]
    if not same:
        target.view(part.dtype).copy_(raw.view(part.stored))
    return len(raw)


def read(part: Stored) -> Tensor:
    """Return a tensor from its file."""
    target = torch.empty(part.bytes, dtype=torch.uint8)
    read_into(part, target)
    return target.view(part.dtype).view(part.shape)
