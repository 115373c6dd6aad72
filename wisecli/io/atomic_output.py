"""Where results go: room for them, and directories that appear whole or not at all."""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wisecli.errors import NoSpaceError, UnwritableError
from wisecli.io.overwrite_policy import Output
from wisecli.io.user_cache import cache_path

# What ends the name of a former output that is moved aside while a new one takes its place.
_ASIDE = ".old"
_UNWRITABLE = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
# A file may be no larger, by `ulimit -f` or a quota.
_TOO_LARGE = (errno.EFBIG, errno.EDQUOT)


def require_space(output: Path, needed: int) -> None:
    """Check the free space where ``output`` will be written, in bytes.

    Raises:
        NoSpaceError: less than ``needed`` is free.
        UnwritableError: what it would lie in is a file.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UnwritableError(output, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent)))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise NoSpaceError(output, needed, free)


@contextmanager
def whole_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory that replaces ``output`` when the block ends well, and vanishes otherwise.

    What ``force`` may replace is the caller's to check beforehand, with :class:`~wisecli.io.overwrite_policy.Output`.
    What killed runs left here is taken away first.

    Raises:
        OutputExistsError: ``output`` exists and ``force`` is not set.
        NoSpaceError: the disk filled up inside the block.
        UnwritableError: nothing may be written there.
    """
    if not force:
        Output(output, ()).require()
    output = output.absolute()
    with _alone(output) as alone:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            if alone:
                sweep(output)
            working = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        try:
            with writing(output):
                yield working
                if not force:  # another process may have written it meanwhile
                    Output(output, ()).require()
                put_in_place(working, output)
        finally:
            shutil.rmtree(working, ignore_errors=True)


@contextmanager
def _alone(output: Path) -> Iterator[bool]:
    """Whether no other process of this user is writing the same output."""
    name = hashlib.sha256(os.fsencode(output)).hexdigest()[:32]
    lock = FileLock(cache_path("locks") / f"{name}.lock", fallback_to_soft=False)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except (OSError, Timeout, NotImplementedError):  # held by another, or no place for locks
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _prefix(output: Path) -> str:
    """Return how the names of an output's working directories begin."""
    return f".{output.name}.wise-"


def tidy(output: Path) -> None:
    """Take away what killed runs left beside an output, unless another process is writing it."""
    output = output.absolute()
    with _alone(output) as alone, suppress(OSError):  # on a disk that cannot be written it may stay
        if alone:
            sweep(output)


def discard(directory: Path, output: Path) -> None:
    """Remove a directory beside an output; the next :func:`tidy` finishes what an interruption leaves."""
    aside = Path(tempfile.mkdtemp(prefix=_prefix(output.absolute()), dir=directory.parent))
    directory.replace(aside)
    shutil.rmtree(aside)


def sweep(output: Path) -> None:
    """Take away what killed runs left beside an output; what one had moved aside comes back if nothing took its place.

    Nobody else may be writing the output.
    """
    for old in sorted(output.parent.glob(f"{glob.escape(_prefix(output))}*{_ASIDE}")):
        if not output.exists() and not output.is_symlink():
            old.replace(output)
    for left in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        if left.is_symlink() or not left.is_dir():
            left.unlink(missing_ok=True)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Say what the disk of an output has against it.

    Raises:
        NoSpaceError: it is full.
        UnwritableError: it is read-only, or not ours to write on.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(output) from error
        if error.errno in (*_UNWRITABLE, *_TOO_LARGE):
            raise UnwritableError(output, error) from error
        raise


def put_in_place(working: Path, output: Path) -> None:
    """Move a finished directory to ``output``, replacing what is there, on the same disk.

    Both change places in one step where the system can do that; elsewhere the old one is moved aside first, and comes
    back if the new one cannot follow. The old one is then gone.
    """
    working.chmod(0o755)
    if not output.exists() and not output.is_symlink():
        working.replace(output)
        return
    if _exchanged(working, output):
        _remove(working)
        return
    aside = Path(tempfile.mkdtemp(prefix=_prefix(output), suffix=_ASIDE, dir=output.parent))
    aside.rmdir()
    output.replace(aside)
    try:
        working.replace(output)
    except BaseException:
        aside.replace(output)
        raise
    _remove(aside)


def _exchanged(first: Path, second: Path) -> bool:
    """Let two directory entries change places in one step (Linux); ``False`` where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file under another name, or copy it where the disk has no links."""
    try:
        os.link(os.path.realpath(source), target)  # of a link, what it leads to
    except OSError:
        shutil.copyfile(source, target)
