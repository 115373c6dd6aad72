"""Whether an output exists just as a command would write it: one check for shards, memories and exports."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from wisecli.artifacts.checksums import is_signed
from wisecli.errors import DamagedFileError, OutputExistsError

Content = TypeVar("Content")


def up_to_date(
    manifest: Path,
    read: Callable[[Path], Content],
    changes: Callable[[Content], Iterable[str]],
    damage: Callable[[Content], Iterable[str]],
    *,
    signed: bool = False,
) -> Content | None:
    """Return an output's manifest if the output is what would be written; ``None`` if there is no manifest.

    Args:
        manifest: the file, in the output's directory.
        read: reads that directory's manifest.
        changes: what is asked for otherwise, each as a phrase.
        damage: the files that were altered, each as a phrase; they are looked at only if nothing else differs.
        signed: whether the output is to be signed.

    Raises:
        OutputExistsError: the output is another, or damaged; naming what differs.
    """
    if not manifest.is_file():
        return None
    output = manifest.parent
    try:
        found = read(output)
    except DamagedFileError as error:
        raise OutputExistsError(output, [str(error)]) from None
    require_same(output, [*(list(changes(found)) or damage(found)), *unsigned(output, signed=signed)])
    return found


def unsigned(output: Path, *, signed: bool) -> list[str]:
    """Return what a missing signature is called, if an output is to have one."""
    return ["it is not signed"] if signed and not is_signed(output) else []


def require_same(output: Path, differences: list[str]) -> None:
    """Check that an output is what would be written.

    Raises:
        OutputExistsError: it does; naming what differs.
    """
    if differences:
        raise OutputExistsError(output, differences)
