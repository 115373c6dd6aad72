"""Lazy safetensors, fingerprints, and hub ids."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wisecli.errors import DamagedFileError, ModelError, NoSpaceError, NotFiniteTensorError, UnwritableError
from wisecli.io.digest import sha256_file
from wisecli.io.json_schema import decode, parse
from wisecli.io.safe_paths import inside, require_regular
from wisecli.io.safetensors_header import TensorLayout, format_name, read_header, require_header

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Marks a copy of a fetched model as one.
FETCHED_NAME = "wise-fetch.json"
# Where the config of an exported checkpoint describes its memory.
EXPORTED_KEY = "wise"
# What safetensors says of an error of the disk.
_OS_ERROR = re.compile(r"os error (\d+)")
# Where the manifest of an export says what was asked for.
EXPORT_RECORD = "export"
# Types of weights that are also stored in bfloat16; what is quantised is not.
_ROUNDED = ("float64", "float32", "bfloat16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# No manifest or config comes near it.
_LARGEST_JSON = 1 << 28


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedFileError: the file is missing, no JSON object, nested absurdly deep or absurdly large.
    """
    require_regular(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise DamagedFileError(path, f"larger than {_LARGEST_JSON} bytes", "make it anew")
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedFileError(path, f"not readable as JSON ({error})", "make it anew") from None
    if not isinstance(value, dict):
        raise DamagedFileError(path, "expected a JSON object", "make it anew")
    return value


def write_json(path: Path, value: object) -> None:
    """Write a JSON value, indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_json(path: Path, value: object) -> None:
    """Write a JSON value in the place of a file, whole or not at all."""
    working = path.with_suffix(".tmp")
    write_json(working, value)
    working.replace(path)


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all of a tensor's numbers are finite, without as much memory again."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (made contiguous, on the CPU) as safetensors.

    Args:
        metadata: what to say in the header; several entries are written in no certain order.

    Raises:
        NotFiniteTensorError: a tensor holds numbers that are not finite; nothing is written.
        NoSpaceError: the disk is full.
        UnwritableError: the disk has something else against it, such as a limit of files' sizes.
    """
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in ready.items():
        if not all_finite(tensor):
            raise NotFiniteTensorError(path, name)
    try:
        save_file(ready, path, metadata=dict(metadata or {"format": "pt"}))
        path.chmod(0o644)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        if int(number[1]) == errno.ENOSPC:
            raise NoSpaceError(path) from error
        raise UnwritableError(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error


def keep_in_cache(path: Path, save: Callable[[Path], None]) -> None:
    """Let a tensors file be written into the user's cache, whole or not at all; failing only costs time."""
    working = path.with_suffix(f".{os.getpid()}.{id(save)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(working)
        working.replace(path)
    except (OSError, SafetensorError, NoSpaceError, UnwritableError):
        with suppress(OSError):
            working.unlink()


def load_tensors(
    path: Path, *, digest: str | None = None, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        digest: the sha256 the file must have, as its manifest records it.
        wanted: whether a tensor of that name is wanted; all are by default.

    Raises:
        DamagedFileError: the file is missing, truncated or does not have that digest.
    """
    with open_tensors(path) as stream:
        if digest is not None and sha256_file(path) != digest:
            raise DamagedFileError(path, "its sha256 differs from the manifest's", "it was altered; make it anew")
        return {name: stream.get_tensor(name) for name in stream.keys() if wanted(name)}  # noqa: SIM118 (not a mapping)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file lazily; its header and length are checked.

    Raises:
        DamagedFileError: the file is missing, truncated or no safetensors file.
    """
    require_header(path)
    try:
        stream = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path, f"not a whole safetensors file ({error})", "copy or make it anew") from None
    with stream:
        yield stream


def _way_out(directory: Path) -> str:
    if not any(path.suffix in _PICKLED for path in directory.iterdir()):
        return "download the model whole, or convert its weights to safetensors"
    return (
        "its weights are pickled, which can run code and is never read: if you trust them, "
        "load the directory once with transformers and write it anew with `save_pretrained`"
    )


class Checkpoint:
    """The safetensors files of a model directory, read one tensor at a time.

    Args:
        without: a file of it whose tensors are left out.

    Raises:
        ModelError: there are no safetensors weights in the directory.
        DamagedFileError: a file is missing or truncated.
    """

    def __init__(self, directory: Path, *, without: str | None = None) -> None:
        self.directory = directory
        self._layouts: dict[str, TensorLayout] = {}
        index = directory / INDEX_NAME
        if (directory / SINGLE_NAME).is_file():
            self._files = self._scan([SINGLE_NAME])
        elif index.is_file():
            mapping = weight_map(index)
            present = self._scan(sorted(set(mapping.values())))
            missing = sorted(mapping.keys() - present.keys())
            if missing:
                raise DamagedFileError(index, f"tensor {missing[0]} is in no file", "copy the checkpoint anew")
            self._files = present
        else:
            raise ModelError(f"{directory} holds no {SINGLE_NAME} or {INDEX_NAME}; {_way_out(directory)}")
        if without is not None:
            self._files = {name: file for name, file in self._files.items() if file != without}

    def _scan(self, names: list[str]) -> dict[str, str]:
        files: dict[str, str] = {}
        for name in names:
            layouts = read_header(inside(self.directory, name, follow=True)).tensors
            self._layouts |= layouts
            files.update(dict.fromkeys(layouts, name))
        return files

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return [self.directory / name for name in sorted(set(self._files.values()))]

    def file_of(self, tensor: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._files[tensor]

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header alone."""
        return self._layouts[tensor].shape

    @property
    def types(self) -> set[str]:
        """Types of the tensors as torch spells them, from the headers alone."""
        return {layout.dtype for layout in self._layouts.values()}

    def dtype(self, tensor: str) -> torch.dtype:
        """Return the type of a tensor, from the header alone."""
        import torch

        found: torch.dtype = getattr(torch, self._layouts[tensor].dtype)
        return found

    @cached_property
    def sample(self) -> str:
        """Digest of one row of every tensor: tells a model from one that was trained on from it, at little cost."""
        digest = hashlib.sha256()
        for name, layout, row in self._middle_rows():
            digest.update(f"{name} {format_name(layout.dtype)} {list(layout.shape)}".encode())
            digest.update(row)
        return digest.hexdigest()

    @cached_property
    def rounded_sample(self) -> str:
        """Digest of one row of every tensor, wide numbers in bfloat16: what a model in single precision has in common
        with itself stored in bfloat16.
        """
        import torch

        digest = hashlib.sha256()
        for name, layout, row in self._middle_rows():
            digest.update(f"{name} {list(layout.shape)}".encode())
            if layout.dtype in _ROUNDED and row:
                weights = torch.frombuffer(bytearray(row), dtype=getattr(torch, layout.dtype))
                digest.update(weights.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
            else:
                digest.update(row)
        return digest.hexdigest()

    def _middle_rows(self) -> Iterator[tuple[str, TensorLayout, bytes]]:
        """Yield the name of every tensor, its layout and its middle row.

        Rows are read, not mapped: mapped pages count as memory of the process.
        """
        for file in self.files:
            header = read_header(file)
            with file.open("rb") as stream:
                for name, layout in sorted(header.tensors.items()):
                    rows = layout.shape[0] if layout.shape else 1
                    length = layout.bytes // max(rows, 1)
                    stream.seek(header.starts[name] + rows // 2 * length)
                    yield name, layout, stream.read(length)

    def load(self, tensor: str) -> torch.Tensor:
        """Return one tensor, in its stored dtype."""
        with open_tensors(self.directory / self._files[tensor]) as stream:
            loaded: torch.Tensor = stream.get_tensor(tensor)
            return loaded


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor, as the index of a checkpoint says.

    Raises:
        DamagedFileError: it is missing or no such index.
    """
    try:
        return decode(dict[str, str], read_json(index).get("weight_map", {}), "weight_map")
    except ValueError as error:
        raise DamagedFileError(index, f"an entry is wrong ({error})", "copy the checkpoint anew") from None
