"""What kind of directory a path is: of shards, a memory, or a routed checkpoint that ``wise export`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from wisecli import shard_directory
from wisecli.errors import DamagedFileError, ModelError
from wisecli.manifest import MANIFEST_NAME

Kind = Literal["shards", "memory", "exported"]


def kind_of(path: Path) -> Kind:
    """Tell a directory's kind by the names of its files; nothing is opened.

    Raises:
        ModelError: it is none of the three.
        DamagedFileError: the path cannot be looked at.
    """
    try:
        if (path / shard_directory.MANIFEST_NAME).exists():
            return "shards"
        if (path / MANIFEST_NAME).exists():
            return "exported" if (path / "config.json").exists() else "memory"
    except (OSError, ValueError) as error:
        raise DamagedFileError(path, f"cannot be looked at ({error})", "check the path") from None
    raise ModelError(
        f"{path} holds neither {shard_directory.MANIFEST_NAME} nor {MANIFEST_NAME}; "
        "give a directory that `wise edit`, `wise merge` or `wise export --format routed` wrote"
    )
