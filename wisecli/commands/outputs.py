"""What each command may replace where it writes; asked before torch is imported, and once more before it is done.

What a former run left is not refused here where it is not to be replaced: it may be the very thing that is asked for.
"""

from collections.abc import Sequence
from pathlib import Path

from wisecli.artifacts import file_names
from wisecli.io.overwrite_policy import Output


def shards_output(output: Path, model: str | None, *inputs: Path, force: bool = False) -> Output:
    """Return where shards go: only former shards are replaced there."""
    base = [Path(model)] if model is not None and _exists(model) else []
    return Output(output, (file_names.SHARDS,), (*base, *inputs), never=("config.json",), force=force)


def memory_output(output: Path, shards: Sequence[Path], *, force: bool = False) -> Output:
    """Return where a memory goes: only a former one is replaced there."""
    return Output(output, (file_names.MEMORY,), shards, never=("config.json",), force=force)


def checkpoint_output(
    output: Path, memory: Path, model: str | None, metrics: Path | None, *, force: bool = False
) -> Output:
    """Return where a checkpoint or a delta goes: only a former one is replaced there."""
    inputs = [memory, *([Path(model)] if model and _exists(model) else []), *([metrics] if metrics else [])]
    return Output(output, (file_names.MEMORY, file_names.MERGED), inputs, (file_names.HISTORY,), force)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long, or has a null byte in it
        return False
