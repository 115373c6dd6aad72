"""Where results go: room for them, and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wisecli.errors import NoSpaceError, OutputExistsError, UnwritableError

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def require_space(output: Path, needed: int) -> None:
    """Check the free space where ``output`` will be written, in bytes.

    Raises:
        NoSpaceError: less than ``needed`` is free.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise NoSpaceError(output, needed, free)


def refuse_existing(output: Path, *, force: bool) -> None:
    """Refuse to write over a directory that is there, unless forced.

    Raises:
        OutputExistsError: it exists and is not empty.
    """
    if not force and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputExistsError(output)


@contextmanager
def whole_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the place of ``output`` when the block ends well, and vanishes otherwise.

    Raises:
        OutputExistsError: ``output`` exists and ``force`` is not set.
        NoSpaceError: the disk filled up inside the block.
        UnwritableError: nothing may be written there.
    """
    refuse_existing(output, force=force)
    output = output.absolute()
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with writing(output):
            yield working
            put_in_place(working, output)
    finally:
        shutil.rmtree(working, ignore_errors=True)


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
        if error.errno in _UNWRITABLE:
            raise UnwritableError(output, error) from error
        raise


def put_in_place(working: Path, output: Path) -> None:
    """Let a finished directory take the place of what is at ``output``, on the same disk."""
    working.chmod(0o755)
    if output.exists():
        doomed = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.replace(doomed / output.name)
        working.replace(output)
        shutil.rmtree(doomed)
    else:
        working.replace(output)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under another name, or a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
