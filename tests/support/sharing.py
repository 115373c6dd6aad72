"""What many tests look at and none changes: made once, by the first process that needs it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

Share = Callable[[str, Callable[[Path], object]], Path]


def made_once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The directory `root/name`, made by `make` in one process while the others wait for it."""
    path, whole = root / name, root / f"{name}.whole"
    with FileLock(root / f"{name}.lock"):
        if not whole.exists():
            if path.exists():  # whoever made it before did not get to the end
                shutil.rmtree(path)
            path.mkdir()
            make(path)
            whole.touch()
    return path
