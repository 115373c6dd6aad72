"""Locks between processes: files that are removed when they are released."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Hold a lock while the block lasts, or tell that another process holds it; it dies with its owner.

    The file goes when the lock is let go. Whoever opened it before that would hold a lock on a file that nobody else
    finds any more, so what is held is compared with what is there.

    Raises:
        OSError: the file system has no locks, or is not to be written on.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            yield False
            return
        if _is_there(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield True
    finally:
        with suppress(FileNotFoundError):
            path.unlink()  # while it is held
        os.close(descriptor)


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
