"""Who is at work on which shards of a directory. What a process has claimed is free again when it dies."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# Of whoever plans, claims or finishes; of each claim; and what tells a directory from one made anew in its place.
_LOCK_NAME, _CLAIM, _TOKEN_NAME = "lock", re.compile(r"claim-(\d+)-(\d+)-\w+\.lock"), "token"


class ShardLocks:
    """The claims of one process on the shards of a directory.

    A claim is a file ``claim-FIRST-END-….lock`` that is locked while it holds. Claims are made, and looked through,
    under a lock of the whole directory. Whoever finishes removes the directory with all of them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._whole = FileLock(directory / _LOCK_NAME, fallback_to_soft=False)
        self._own: list[FileLock] = []
        with self._whole:
            token = directory / _TOKEN_NAME
            if not token.is_file():
                token.write_text(secrets.token_hex(16), encoding="ascii")
            self._token = token.read_text(encoding="ascii")

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Wait until no other process plans, claims or finishes; false if the directory is gone or another by then."""
        with self._whole:
            current = self._is_current()
            try:
                yield current
            finally:
                if not current:
                    self._tidy()

    def acquire(self, numbers: range) -> bool:
        """Claim shards, besides those that are held already; false if another process holds one of them."""
        if not numbers:
            return True
        with self._whole:
            if not all(self._is_free(path) for path in self._claims(numbers)):
                return False
            name = f"claim-{numbers.start}-{numbers.stop}-{secrets.token_hex(4)}.lock"
            lock = FileLock(self._directory / name, fallback_to_soft=False)
            lock.acquire(blocking=False)
            self._own.append(lock)
            return True

    def release(self) -> None:
        """Release the claims."""
        for lock in self._own:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        self._own.clear()
        if not self._is_current():
            self._tidy()

    def _claims(self, numbers: range) -> Iterator[Path]:
        """Yield the claims of other processes, alive or not, on some of these shards."""
        own = {Path(lock.lock_file).name for lock in self._own}
        for path in self._directory.iterdir():
            found = _CLAIM.fullmatch(path.name)
            if found and path.name not in own and int(found[1]) < numbers.stop and int(found[2]) > numbers.start:
                yield path

    def _is_free(self, path: Path) -> bool:
        """Return whether the process that made a claim is gone, and remove the claim then."""
        lock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        path.unlink(missing_ok=True)
        lock.release()
        return True

    def _is_current(self) -> bool:
        try:
            return (self._directory / _TOKEN_NAME).read_text(encoding="ascii") == self._token
        except OSError:
            return False

    def _tidy(self) -> None:
        """Take away the directory again where waiting for its lock has made it anew."""
        left = list(self._directory.iterdir()) if self._directory.is_dir() else []
        if [path.name for path in left] == [_LOCK_NAME]:
            left[0].unlink()
            self._directory.rmdir()


def is_lock_file(name: str) -> bool:
    """Return whether a file in such a directory belongs to its locks."""
    return name in (_LOCK_NAME, _TOKEN_NAME) or _CLAIM.fullmatch(name) is not None
