"""Weights that were learned of a base model and come with the package, each file with the key of what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wisecli.io.checkpoint import save_tensors
from wisecli.io.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

PACKAGED = Path(__file__).parents[1] / "data" / "learned"
_KEY = "wise.learned"


def packaged_file(key: str, directory: Path | None = None) -> Path | None:
    """Return the file that has this key, of the package or of another directory; None if none has."""
    files = sorted((directory or PACKAGED).glob("*.safetensors"))
    return next((path for path in files if read_header(path).metadata.get(_KEY) == key), None)


def save_packaged(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Write tensors with the key by which they are known."""
    save_tensors(path, tensors, {_KEY: key})
