"""One exception tree; every leaf is a case the user can act on, with the exit code it ends in."""

from __future__ import annotations

from pathlib import Path


class WiseError(Exception):
    """Base of everything the program raises on purpose. The message is one sentence naming the remedy."""

    exit_code = 2


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SettingsError(WiseError):
    """A flag, an environment variable or a line of the settings file cannot be used."""


class EditFileError(WiseError):
    """A file of edits cannot be used; names the file and, where there is one, the line or record."""

    def __init__(self, path: Path, reason: str, *, line: int | None = None) -> None:
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {reason}")


class ModelError(WiseError):
    """A base model cannot be found, read or edited."""


class UnknownArchitectureError(ModelError):
    """The model's architecture has no row in ``architectures.toml``."""


class DamagedFileError(WiseError):
    """A file is truncated, altered or not what its name says."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")


class WrongBaseError(WiseError):
    """Shards or a memory were made from another base model than the one given."""


class MismatchedShardsError(WiseError):
    """Shards cannot be merged because they do not belong to the same matrix of the same model."""


class OutputExistsError(WiseError):
    """The output directory is already there and ``--force`` was not given."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} already exists; pass --force to replace it or -o to write elsewhere")


class NoSpaceError(WiseError):
    """The disk is too full for the output."""

    def __init__(self, path: Path, needed: int | None = None, free: int | None = None) -> None:
        detail = (
            f" ({needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free)"
            if needed is not None and free is not None
            else ""
        )
        super().__init__(f"no space left on the disk of {path}{detail}; free some space or pass -o to write elsewhere")


class DownloadError(WiseError):
    """Something could not be fetched from a package index or the model hub."""


class GateFailedError(WiseError):
    """A figure stayed below ``--fail-under``, or an edit did not take with ``--strict``."""

    exit_code = 1
