"""One exception tree; every leaf is a case the user can act on, with the exit code it ends in."""

import errno
from collections.abc import Sequence
from pathlib import Path


class WiseError(Exception):
    """Base of everything the program raises on purpose. The message is one sentence naming the remedy.

    ``details`` are the sentences that the message sums up, where there are several.
    """

    exit_code = 2
    details: tuple[str, ...] = ()


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _one_or(sentences: Sequence[str], what: str) -> str:
    """Return the only sentence, or how many there are of them."""
    return sentences[0] if len(sentences) == 1 else f"{what} {len(sentences)} times"


class SettingsError(WiseError):
    """A flag, an environment variable or a line of the settings file cannot be used."""


class EditFileError(WiseError):
    """A file of edits cannot be used; names the file and, where there is one, the line or record."""

    def __init__(self, path: Path, reason: str, *, line: int | None = None) -> None:
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {reason}")


class ConflictError(WiseError):
    """Edits cannot all hold; ``details`` has a sentence for each that cannot."""

    def __init__(self, path: str, sentences: Sequence[str]) -> None:
        what = _one_or(sentences, f"{path}: edits are in conflict")
        super().__init__(f"{what}; mend the file, or choose with --on-conflict")
        self.details = tuple(sentences)


class ModelError(WiseError):
    """A base model cannot be found, read or edited."""


class UnknownArchitectureError(ModelError):
    """The model's architecture has no row in ``architectures.toml``."""


class OwnCodeError(ModelError):
    """A model comes with code of its own, which nobody has let run."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"{directory} comes with code of its own: read it, and let it run with --trust-remote-code")


class DamagedFileError(WiseError):
    """A file is truncated, altered or not what its name says."""

    _behind_path = ":"

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path}{self._behind_path} {reason}; {remedy}")


class WrongDirectoryError(DamagedFileError):
    """A path is not the kind of directory that is wanted; ``what`` it is, and what is ``wanted``."""

    _behind_path = ""

    def __init__(self, path: Path, what: str, wanted: str) -> None:
        super().__init__(path, what, f"give {wanted}")


class NotFiniteTensorError(WiseError):
    """A tensor that is to be written holds numbers that are not finite."""

    def __init__(self, path: Path, tensor: str) -> None:
        super().__init__(f"{path.name}: {tensor} would not be finite; change the settings or the edits")


class WrongBaseError(WiseError):
    """Shards or a memory were made from another base model than the one given."""


class MismatchedShardsError(WiseError):
    """Shards cannot be merged because they do not belong to the same matrix of the same model."""


class OutputExistsError(WiseError):
    """The output directory is already there and ``--force`` was not given.

    ``changes`` are phrases that say in what it is not what the same command would write.
    """

    def __init__(self, path: Path, changes: Sequence[str] = ()) -> None:
        what = f", and is not what this command would write: {'; '.join(changes)}" if changes else ""
        super().__init__(f"{path} already exists{what}; pass --force to replace it or -o to write elsewhere")


class ProtectedOutputError(WiseError):
    """The output is there already, and not this command's to replace, ``--force`` or not."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}, so --force does not replace it; pass -o to write elsewhere or move it")


class UnwritableError(WiseError):
    """The output cannot be written where it was asked for."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be written ({reason_of(error)}); pass -o to write elsewhere")


class CannotLinkError(WiseError):
    """A file cannot have another name where an output is written."""

    def __init__(self, source: Path, directory: Path, error: OSError) -> None:
        reason = (
            "hard links need one file system, and that is on another"
            if error.errno == errno.EXDEV
            else f"it cannot be linked there ({error.strerror or error})"
        )
        super().__init__(
            f"{source} is to be linked into {directory.parent}: {reason}; leave out --link, or copy what cannot be "
            "linked with --link=auto"
        )


class BusyError(WiseError):
    """Another process is at work on the same output."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"another process is writing {path}; wait for it, or pass -o to write elsewhere")


class StoppedError(WiseError):
    """A run was interrupted, and part of its work is kept."""

    exit_code = 130

    def __init__(self, done: int, count: int) -> None:
        super().__init__(f"interrupted; {done} of {count} shards are kept, and the same command goes on from there")


class ChangedInputError(WiseError):
    """An output was begun with other input or settings."""

    def __init__(self, path: Path, changes: Sequence[str]) -> None:
        super().__init__(
            f"{path} was begun with other arguments: {'; '.join(changes)}; go back to those to finish it, or pass "
            "--force to begin anew"
        )


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


class WorkerFailedError(WiseError):
    """An error in another process that the user can act on, with the exit code of that error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class GateFailedError(WiseError):
    """A figure stayed below ``--fail-under``, or an edit did not take with ``--strict``."""

    exit_code = 1


class NothingTookError(GateFailedError):
    """No edit of a run took, in ``module``; ``norm`` is the path of one that stands behind that, if there is one."""

    def __init__(self, count: int, module: str, norm: str | None) -> None:
        why = "the answers they need are out of its reach"
        if norm is not None:
            why = f"{norm} stands behind it and caps what it adds"
        super().__init__(
            f"none of the {count} edits took in {module}, so nothing was written: {why}; edit another layer with "
            "--layer, or give more steps with residual_more in --config"
        )


class ServerError(WiseError):
    """A server cannot be reached, refuses a request or answers nonsense; ``status`` is HTTP's, where there is one."""

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        self.reason, self.status = reason, status
        super().__init__(f"{url} {reason}")


class ServedWrongError(GateFailedError):
    """Answers of a server do not hold; ``details`` has a sentence for each."""

    def __init__(self, url: str, asked: int, sentences: Sequence[str]) -> None:
        self.details = tuple(sentences)
        super().__init__(f"{len(sentences)} of {asked} answers of {url} do not hold")


class PolicyError(GateFailedError):
    """Edits break the rules of ``--policy``; ``details`` has a sentence for each time they do."""

    def __init__(self, file: str, policy: Path, sentences: Sequence[str]) -> None:
        super().__init__(f"{_one_or(sentences, f'{file} breaks rules')}; {policy} does not allow it")
        self.details = tuple(sentences)


class SignatureError(GateFailedError):
    """The signature that ``--verify-signature`` names does not hold for a file of edits."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; nothing of it was read")


class MemoryHistoryError(WiseError):
    """A memory has no history: it was merged without one, or by a version that wrote none."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} has no history, as it was merged with --no-history or by an older version; merge its shards anew "
            "with `wise merge` for one that can be changed and looked back on"
        )
