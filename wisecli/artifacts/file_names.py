"""Names of the files and directories that mark what a directory is."""

from pathlib import Path

# Of shards, of a memory or a routed checkpoint, and of a merged checkpoint.
SHARDS = "shards.json"
MEMORY = "router.json"
MERGED = "wise.json"
# The file with the decoder blocks that are a memory.
MEMORY_TENSORS = "model-memory.safetensors"
# What makes of a memory one that is edited again and again.
HISTORY = "history"
IS_MEMORY = "is a memory"


def what_is_at(path: Path) -> str:
    """Return in words what a path is, as far as the names of files tell; nothing is opened."""
    if not path.is_dir():
        return "is a file" if path.exists() else "does not exist"
    kinds = {
        SHARDS: "holds shards",
        MEMORY: "is a checkpoint with a router" if (path / "config.json").is_file() else IS_MEMORY,
        MERGED: "is a checkpoint that was exported without a router",
        "config.json": "is a model",
    }
    return next((what for name, what in kinds.items() if (path / name).is_file()), "holds nothing that `wise` wrote")
