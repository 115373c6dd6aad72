"""Names of the files and directories that mark what a directory is."""

from pathlib import Path
from typing import Literal

# Of shards, of a memory or a routed checkpoint, and of a merged checkpoint.
SHARDS = "shards.json"
MEMORY = "router.json"
MERGED = "wise.json"
# The file with the decoder blocks that are a memory.
MEMORY_TENSORS = "model-memory.safetensors"
# What makes of a memory one that is edited again and again.
HISTORY = "history"
# What makes a directory a model.
_CONFIG = "config.json"
PathKind = Literal["nothing", "file", "shards", "memory", "exported", "unrouted", "model", "unknown"]
_IN_WORDS: dict[PathKind, str] = {
    "nothing": "does not exist",
    "file": "is a file",
    "shards": "holds shards",
    "memory": "is a memory",
    "exported": "is a checkpoint with a router",
    "unrouted": "is a checkpoint that was exported without a router",
    "model": "is a model",
    "unknown": "holds nothing that `wise` wrote",
}


def kind_at(path: Path) -> PathKind:
    """Return what a path is, as far as the names of files tell; nothing is opened."""
    if not path.is_dir():
        return "file" if path.exists() else "nothing"
    kinds: dict[str, PathKind] = {
        SHARDS: "shards",
        MEMORY: "exported" if (path / _CONFIG).exists() else "memory",
        MERGED: "unrouted",
        _CONFIG: "model",
    }
    return next((kind for name, kind in kinds.items() if (path / name).exists()), "unknown")


def what_is_at(path: Path) -> str:
    """Return in words what a path is, by :func:`kind_at`."""
    return _IN_WORDS[kind_at(path)]
