"""Where a checkpoint keeps the parameters of a decoder layer, and how they are read into one buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """A parameter of a layer: where its numbers lie in which file, and where they go in the layer's buffer."""

    name: str
    path: Path
    start: int
    stored: torch.dtype
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    @property
    def bytes(self) -> int:
        """Size in the buffer."""
        return self.shape.numel() * self.dtype.itemsize


# Where parameters lie, by their names: the file, and what they are called in it.
Places = Mapping[str, tuple[Path, str]]


def locate(
    checkpoint: Checkpoint, path: str, layer: nn.Module, headers: dict[Path, Header], places: Places
) -> list[Stored]:
    """Return where a layer's parameters lie, in the order in which the files have them.

    Args:
        headers: of files; those of further ones are added.
        places: of parameters that do not lie in the checkpoint, or not by their own names.
    """
    parts, offset = [], 0
    named = []
    for name, parameter in layer.named_parameters():
        file, spelling = places.get(f"{path}.{name}") or _in_checkpoint(checkpoint, f"{path}.{name}")
        if file not in headers:
            headers[file] = read_header(file)
        if spelling not in headers[file].tensors or headers[file].tensors[spelling].shape != tuple(parameter.shape):
            raise ModelError(
                f"{checkpoint.directory}: the checkpoint does not hold {path}.{name} as the model has it, "
                "so its layers cannot be streamed; leave out the memory budget"
            )
        named.append((file, headers[file].starts[spelling], spelling, name, parameter))
    for file, start, spelling, name, parameter in sorted(named, key=lambda piece: piece[:2]):
        stored = getattr(torch, headers[file].tensors[spelling].dtype)
        parts.append(Stored(name, file, start, stored, parameter.dtype, parameter.shape, offset))
        offset += -(-parts[-1].bytes // _ALIGNMENT) * _ALIGNMENT
    return parts


def _in_checkpoint(checkpoint: Checkpoint, name: str) -> tuple[Path, str]:
    """Return the file that a parameter lies in, or any, and what it is called there."""
    spelling = stored_name(checkpoint, name)
    return (
        (checkpoint.files[0], name)
        if spelling is None
        else (checkpoint.directory / checkpoint.file_of(spelling), spelling)
    )


def buffer_size(parts: Sequence[Stored]) -> int:
    """Return the bytes of the buffer that holds a layer."""
    return parts[-1].offset + parts[-1].bytes


def read_into(part: Stored, target: Tensor) -> int:
    """Read a parameter into its place (bytes,), in its own type, and return how much was read."""
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
