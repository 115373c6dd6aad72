"""What ``--force`` may replace: a former output of the same command, and nothing that is, holds or lies in an input."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from wisecli.errors import OutputExistsError, ProtectedOutputError


@dataclass(frozen=True)
class Output:
    """Where a command writes, and what it may replace there.

    ``marks`` are names of files, any of which marks a directory as this command's own; ``never`` names that mark it as
    something else. ``inputs`` are what the command reads.
    """

    path: Path
    marks: Collection[str]
    inputs: Sequence[Path] = ()
    never: Collection[str] = ()
    force: bool = False

    def require(self) -> None:
        """Check that the output may be written.

        Raises:
            OutputExistsError: something is there, and nothing is to be replaced.
            ProtectedOutputError: what is there is not this command's to replace.
        """
        if _is_free(self.path):
            if self.path.exists() and (reason := _in_use(self.path.resolve())):
                raise ProtectedOutputError(self.path, reason)
            return
        if not self.force:
            raise OutputExistsError(self.path)
        if reason := _protected(self.path, self.inputs) or self._foreign():
            raise ProtectedOutputError(self.path, reason)

    @property
    def is_kept(self) -> bool:
        """Whether an output of this command is there and is not to be replaced: it may be what is asked for."""
        return not self.force and any((self.path / name).is_file() for name in self.marks)

    def require_unless_kept(self) -> None:
        """Check that the output may be written, unless one is there that may be what is asked for.

        Raises:
            OutputExistsError: something else is there, and nothing is to be replaced.
            ProtectedOutputError: what is there is not this command's to replace.
        """
        if not self.is_kept:
            self.require()

    def require_apart(self) -> None:
        """Check that what is replaced, if anything is, neither is nor holds nor lies in an input.

        Raises:
            ProtectedOutputError: it does.
        """
        if not _is_free(self.path) and (reason := _protected(self.path, self.inputs)):
            raise ProtectedOutputError(self.path, reason)

    def _foreign(self) -> str:
        """Return why what is there is none of this command's outputs; empty if it is one."""
        if not self.path.is_dir():
            return "is no directory"
        if any((self.path / name).exists() for name in self.never):
            return f"holds {next(name for name in self.never if (self.path / name).exists())}"
        if not any((self.path / name).is_file() for name in self.marks):
            return f"holds no {' or '.join(sorted(self.marks))}, so it was not written by this command"
        return ""


def _is_free(path: Path) -> bool:
    """Return whether nothing is there, or an empty directory."""
    if path.is_symlink() or not path.is_dir():
        return not (path.exists() or path.is_symlink())
    return not any(path.iterdir())


def _in_use(path: Path) -> str:
    """Return why a directory cannot be exchanged for another while it is in use; empty if it can."""
    for what, other in (("the current directory", Path.cwd()), ("your home directory", Path.home())):
        if path == other.resolve() or path in other.resolve().parents:
            return f"is or holds {what}"
    return "is a mount point" if os.path.ismount(path) else ""


def _protected(path: Path, inputs: Sequence[Path]) -> str:
    """Return why a path is never replaced, for any content; empty if it may be."""
    resolved = path.resolve()
    if reason := _in_use(resolved):
        return reason
    for source in inputs:
        other = source.resolve()
        if resolved == other:
            return "is an input of the command"
        if resolved in other.parents:
            return f"holds {source}, an input of the command"
        if other in resolved.parents:
            return f"lies in {source}, an input of the command"
    return ""
