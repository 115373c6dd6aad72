"""Read the side memory of a checkpoint again when the directory holds another release of it. Needs nothing of vLLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from wisecli.artifacts.former_names import current_description, current_names
from wisecli.artifacts.memory_manifest import MANIFEST_NAME
from wisecli.io.checkpoint import EXPORTED_KEY, INDEX_NAME, read_json


class ReleaseError(Exception):
    """What lies in a checkpoint's directory cannot take the place of the memory that is served."""


def release_in(checkpoint: Path) -> str | None:
    """Return what distinguishes a directory's release from others; ``None`` if there is none at the moment."""
    try:
        found = (checkpoint / MANIFEST_NAME).stat()
    except OSError:
        return None
    return f"{found.st_ino}-{found.st_mtime_ns}"


def made_for(checkpoint: Path) -> Mapping[str, Any] | None:
    """Return the base and the site of a checkpoint's memory, which a release that takes its place must share."""
    try:
        manifest = read_json(checkpoint / MANIFEST_NAME)
    except OSError:
        return None
    base = {name: manifest["base"].get(name) for name in ("matrix", "config")}
    return {"base": base, "site": manifest["site"], "pooling": current_description(manifest["memory"])["pooling"]}


def read_release(checkpoint: Path, wanted: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the description of a directory's memory, and its tensors.

    Args:
        wanted: what it must be made for, as :func:`made_for` gives it.

    Raises:
        ReleaseError: it is made for something else.
    """
    if made_for(checkpoint) != wanted:
        raise ReleaseError("it was made on another base, at another layer, or decides in another way")
    described = read_json(checkpoint / "config.json")[EXPORTED_KEY]
    paths = own_paths(described)
    files = read_json(checkpoint / INDEX_NAME)["weight_map"]
    held = {stored: name for stored in files if (name := name_of(stored, paths)) is not None}
    tensors: dict[str, Tensor] = {}
    for file in sorted({files[stored] for stored in held}):
        content = load_file(checkpoint / file)
        tensors |= {held[stored]: tensor for stored, tensor in content.items() if stored in held}
    return described, tensors


def own_paths(described: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a memory's tensors by their paths in a model."""
    names = current_names({name: name for name in described["memory"]["tensors"]})
    return {f".{described['module']}.{stored}": name for name, stored in names.items()}


def name_of(stored: str, paths: Mapping[str, str]) -> str | None:
    """Return the name of a memory's tensor that is stored so; ``None`` for one of the base's.

    Some bases' checkpoints leave out the first parts of a module's path.

    Args:
        paths: as :func:`own_paths` gives them.
    """
    return next((name for path, name in paths.items() if path.endswith(f".{stored}")), None)
