"""Headers of safetensors files, read and checked without touching the weights behind them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.errors import DamagedFileError
from wisecli.io.json_schema import parse, shown
from wisecli.io.safe_paths import require_regular

# As the format's own reader has it.
_LONGEST = 100_000_000
_PREFIX = 8
# The format's names of types → torch's, and bytes an item.
_TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}


@dataclass(frozen=True)
class TensorLayout:
    """Type (as torch spells it) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * dict(_TYPES.values())[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {'×'.join(map(str, self.shape)) or 'scalar'}"


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    ``starts`` are the places in the file where each tensor's numbers begin; ``bytes`` is the size of the whole file.
    """

    tensors: dict[str, TensorLayout]
    starts: dict[str, int]
    metadata: dict[str, str]
    bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file: every tensor lies in the file, and has the bytes it claims.

    Raises:
        DamagedFileError: the file is missing, truncated or no safetensors file, or its header lies.
    """
    length = require_header(path)
    size, first = path.stat().st_size, _PREFIX + length
    with path.open("rb") as stream:
        stream.seek(_PREFIX)
        raw = stream.read(length)
    try:
        content = parse(raw.decode())
        if not isinstance(content, dict):
            raise ValueError("the header is no JSON object")
        metadata = content.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("the metadata are no texts")
        layouts = dict(_layouts(content, size - first))
        starts = {name: first + content[name]["data_offsets"][0] for name in layouts}
        return Header(layouts, starts, metadata, size)
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def format_name(dtype: str) -> str:
    """Return the format's name of a type that is spelt as torch does."""
    return next(name for name, (spelt, _) in _TYPES.items() if spelt == dtype)


def item_bytes(dtype: str) -> int | None:
    """Return the bytes an item of a type takes that is spelt as torch does; ``None`` if it is no type."""
    return dict(_TYPES.values()).get(dtype)


def require_header(path: Path) -> int:
    """Return the length that a safetensors file gives its header, checked before anything of that length is allocated.

    Raises:
        DamagedFileError: the file is missing, no regular file, or shorter than it says.
    """
    require_regular(path)
    try:
        with path.open("rb") as stream:
            prefix = stream.read(_PREFIX)
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read ({error})", "check its permissions") from None
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX or length > path.stat().st_size - _PREFIX:
        raise _damaged(path, "it is shorter than its header says")
    if length > _LONGEST:
        raise _damaged(path, f"a header of {length} bytes")
    return length


def _layouts(content: dict[str, Any], room: int) -> Iterator[tuple[str, TensorLayout]]:
    """Yield the tensors of a header; check that they fill the ``room`` bytes of the file's data without gaps."""
    end = 0
    places = []
    for name, entry in content.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in list(_TYPES):
            raise ValueError(f"tensor {shown(name)} has no known type")
        dtype, size = _TYPES[entry["dtype"]]
        shape, offsets = _numbers(entry.get("shape"), name), _numbers(entry.get("data_offsets"), name)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * size:
            raise ValueError(f"the offsets of tensor {shown(name)} do not fit its shape")
        places.append((*offsets, name))
        yield name, TensorLayout(dtype, shape)
    for first, last, name in sorted(places):
        if first != end:
            raise ValueError(f"tensor {shown(name)} does not begin where the one before it ends")
        end = last
    if end != room:
        raise ValueError(f"the tensors take {end} bytes and the file has {room}")


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"the shape or the offsets of tensor {shown(name)} are no whole numbers")
    return tuple(value)


def _damaged(path: Path, reason: str) -> DamagedFileError:
    return DamagedFileError(path, f"not a whole safetensors file ({reason})", "copy or make it anew")
