import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from wisecli.errors import UnwritableError
from wisecli.io.locks import lock_file
from wisecli.memory.history.release_log import changing


def test_only_one_holds_a_lock_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for _ in range(2):
        with lock_file(path) as mine, lock_file(path) as other:
            assert (mine, other) == (True, False)
        assert not path.exists()


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug reports on lock files: one process opens the file, its holder removes it, and a third makes it anew."""
    path, real, opened = tmp_path / ".lock", os.open, []

    def open_late(*given: Any) -> int:
        found = real(*given)
        if not opened:  # between the opening and the locking the former holder goes
            path.unlink()
        opened.append(found)
        return found

    monkeypatch.setattr(os, "open", open_late)
    with lock_file(path) as mine, lock_file(path) as other:
        assert (mine, other, len(opened)) == (True, False, 3)
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EROFS])
def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Bug reports on network file systems: locks are not served, and the error named a file nobody had heard of."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UnwritableError, match=r"memory cannot be written .*pass -o"), changing(tmp_path / "memory"):
        pass
