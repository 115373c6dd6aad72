"""Reading a directory that another process may replace meanwhile."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wisecli.errors import BusyError, DamagedFileError, ModelError

T = TypeVar("T")

# A directory that is replaced more often while it is read is not to be read now.
_TRIES = 10


def read_consistently(directory: Path, read: Callable[[], T]) -> T:
    """Return what is read of a directory, all of it of one state: read again if it was replaced meanwhile.

    New releases and forced outputs take a directory's place as a whole, so that the files of one belong together.

    Raises:
        BusyError: it is replaced again and again.
    """
    for _ in range(_TRIES):
        before = _identity(directory)
        try:
            found = read()
        except (DamagedFileError, ModelError, OSError):
            if _identity(directory) == before:
                raise
            continue
        if _identity(directory) == before:
            return found
    raise BusyError(directory)


def _identity(directory: Path) -> tuple[int, ...]:
    """Return what distinguishes a directory from one that replaces it; empty if there is none at the moment."""
    try:
        status = directory.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns
