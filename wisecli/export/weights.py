"""Weights written anew: copied, linked, converted or cut into other files. One tensor is read at a time, if any."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from wisecli.errors import CannotLinkError
from wisecli.io.checkpoint import SINGLE_NAME, Checkpoint
from wisecli.io.safetensors_header import TensorLayout, format_name, read_header

_ALIGNMENT = 8


# Whether files are hard links of the base's: none, all, or those that the disk lets be linked.
Link = Literal[False, True, "auto"]


@dataclass(frozen=True)
class Packing:
    """How weights are written: as files of their own or hard links, in which type, and how many bytes a file at most.

    With ``auto`` a file that cannot be linked is copied. ``None`` leaves a choice to the base.
    """

    link: Link = False
    dtype: torch.dtype | None = None
    file_bytes: int | None = None

    @property
    def as_stored(self) -> bool:
        """Whether the base's files serve as they are."""
        return self.dtype is None and self.file_bytes is None

    def layout(self, stored: TensorLayout) -> TensorLayout:
        """Return type and shape of a tensor once it is written."""
        if self.dtype is None or not getattr(torch, stored.dtype).is_floating_point:
            return stored
        return TensorLayout(str(self.dtype).removeprefix("torch."), stored.shape)


class Transform(Protocol):
    """What becomes of a checkpoint's tensors, by their names there."""

    def layout(self, name: str, layout: TensorLayout) -> TensorLayout:
        """Return type and shape of a tensor afterwards."""

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor's numbers afterwards, of that shape."""


@dataclass(frozen=True)
class _Replaced:
    """Puts other tensors of the same shapes in the place of some, and leaves the others as they are."""

    tensors: Mapping[str, Tensor]

    def layout(self, _name: str, layout: TensorLayout) -> TensorLayout:
        return layout

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        return self.tensors.get(name, tensor)


def write_weights(
    output: Path,
    checkpoint: Checkpoint,
    packing: Packing,
    *,
    single: str = SINGLE_NAME,
    replaced: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write every tensor of a checkpoint into a directory, and return the file that each is in.

    Args:
        single: how a lone file of weights is to be called.
        replaced: tensors that take the place of the checkpoint's, of the same shapes.
    """
    if packing.as_stored:
        return _as_stored(output, checkpoint, packing, single, replaced or {})
    return write_renamed(output, checkpoint, packing, str, single=single, transform=_Replaced(replaced or {}))


def write_renamed(
    output: Path,
    checkpoint: Checkpoint,
    packing: Packing,
    rename: Callable[[str], str],
    *,
    single: str,
    transform: Transform | None = None,
) -> dict[str, str]:
    """Write every tensor of a checkpoint under another name, and return the file that each is in, by its new name.

    The base's own division into files is kept unless the packing says otherwise; nothing is linked.

    Args:
        single: how a lone file of weights is to be called.
        transform: what becomes of each tensor; its layout comes after the packing's, and prevails.
    """
    transform = transform or _Replaced({})
    if packing.as_stored:
        names = {path.name: single if path.name == SINGLE_NAME else path.name for path in checkpoint.files}
        grouped = {names[path.name]: _laid_out(read_header(path).tensors, transform) for path in checkpoint.files}
    else:
        grouped = _numbered(checkpoint, packing, single, transform)
    for file, layouts in grouped.items():
        stored = {rename(name): name for name in layouts}

        def read(name: str, stored: dict[str, str] = stored, layouts: dict[str, TensorLayout] = layouts) -> Tensor:
            own = stored[name]
            return transform.tensor(own, checkpoint.load(own)).to(getattr(torch, layouts[own].dtype))

        write_stream(output / file, {name: layouts[own] for name, own in stored.items()}, read)
    return {rename(name): file for file, layouts in grouped.items() for name in layouts}


def _laid_out(layouts: Mapping[str, TensorLayout], transform: Transform) -> dict[str, TensorLayout]:
    return {name: transform.layout(name, layout) for name, layout in layouts.items()}


def _as_stored(
    output: Path, checkpoint: Checkpoint, packing: Packing, single: str, replaced: Mapping[str, Tensor]
) -> dict[str, str]:
    """Copy or link a checkpoint's files and overwrite the replaced tensors; return each tensor's file."""
    names = {path.name: single if path.name == SINGLE_NAME else path.name for path in checkpoint.files}
    changed = {checkpoint.file_of(name): name for name in replaced}
    for path in checkpoint.files:
        target = output / names[path.name]
        if packing.link and path.name not in changed:
            _link(path.resolve(), target, otherwise_copy=packing.link == "auto")
        else:
            shutil.copyfile(path, target)
    for name, tensor in replaced.items():
        overwrite(output / names[checkpoint.file_of(name)], name, tensor)
    return {name: names[checkpoint.file_of(name)] for name in checkpoint}


def _link(source: Path, target: Path, *, otherwise_copy: bool) -> None:
    """Give a file another name.

    Raises:
        CannotLinkError: the disk does not let it, and it is not to be copied.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if not otherwise_copy:
            raise CannotLinkError(source, target.parent, error) from None
        shutil.copyfile(source, target)


def overwrite(path: Path, name: str, tensor: Tensor) -> None:
    """Put other values in the place of one tensor of a safetensors file."""
    header = read_header(path)
    with path.open("r+b") as stream:
        stream.seek(header.starts[name])
        stream.write(_raw(tensor.to(getattr(torch, header.tensors[name].dtype))))


def _numbered(
    checkpoint: Checkpoint, packing: Packing, single: str, transform: Transform
) -> dict[str, dict[str, TensorLayout]]:
    """Return files of at most the packing's size, by name, and the tensors that go into each."""
    stored = {name: layout for path in checkpoint.files for name, layout in read_header(path).tensors.items()}
    layouts = _laid_out({name: packing.layout(layout) for name, layout in stored.items()}, transform)
    files = list(_grouped(layouts, packing.file_bytes))
    numbered = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    names = numbered if len(files) > 1 else [single]
    return {file: {name: layouts[name] for name in own} for file, own in zip(names, files, strict=True)}


def _grouped(layouts: Mapping[str, TensorLayout], limit: int | None) -> Iterable[list[str]]:
    """Yield names in order, as many together as fit a file; a tensor that is too large has one to itself."""
    group: list[str] = []
    size = 0
    for name, layout in layouts.items():
        if group and limit is not None and size + layout.bytes > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += layout.bytes
    if group:
        yield group


def write_stream(path: Path, layouts: Mapping[str, TensorLayout], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, holding one tensor at a time in memory."""
    ends = list(accumulate(layout.bytes for layout in layouts.values()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for (name, layout), end in zip(layouts.items(), ends, strict=True):
        span = [end - layout.bytes, end]
        header[name] = {"dtype": format_name(layout.dtype), "shape": list(layout.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in layouts:
            stream.write(_raw(read(name)))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat.data)
