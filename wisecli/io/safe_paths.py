"""File names that a manifest gives: paths that lead out of its directory are refused."""

from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from wisecli.errors import DamagedFileError
from wisecli.io.json_schema import shown

# As much as file systems allow.
_LONGEST = 255
# How the text begins.
_POINTER = b"version https://git-lfs.github.com/spec/"
_REMEDY = "do not trust this directory"


def inside(directory: Path, name: str, *, follow: bool = False) -> Path:
    """Return the path of a file that a manifest in ``directory`` names.

    Args:
        follow: let symbolic links lead anywhere, as they do in directories that the hub's cache keeps. Otherwise they
            may lead to files of the directory, or to the blobs of that cache.

    Raises:
        DamagedFileError: the name is absolute, climbs with ``..``, or is a link that leaves the directory.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    anchored = posix.is_absolute() or windows.drive or windows.root
    if not name or "\0" in name or anchored or ".." in windows.parts or posix == PurePosixPath():
        raise DamagedFileError(directory, f"file name {shown(name)} leads out of the directory", _REMEDY)
    if len(name) > _LONGEST:
        raise DamagedFileError(directory, f"file name {shown(name)} is too long", _REMEDY)
    path = directory / name
    if follow:
        return path
    try:
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, a name that is too long
        raise DamagedFileError(directory, f"file name {shown(name)} cannot be followed ({error})", _REMEDY) from None
    kept = next((parent for parent in (home, *home.parents) if parent.parent.name == "snapshots"), None)
    blobs = home if kept is None else kept.parent.parent / "blobs"
    if not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise DamagedFileError(path, f"it is a link that leaves the directory (to {target})", _REMEDY)
    return path


def require_regular(path: Path) -> None:
    """Check that a path is a file, before anything waits for a pipe or reads a device without end.

    Raises:
        DamagedFileError: it is missing, no regular file, or a text of Git LFS in its place.
    """
    try:
        if path.is_file():
            _require_content(path)
            return
        missing = not path.exists() and not path.is_symlink()
    except (OSError, ValueError) as error:
        raise DamagedFileError(path, f"cannot be looked at ({error})", "check the path") from None
    reason = "no such file" if missing else "not a regular file"
    raise DamagedFileError(path, reason, "check the path or make it anew")


def _require_content(path: Path) -> None:
    """Refuse the small text that stands for a large file in a clone without Git LFS."""
    with suppress(PermissionError):  # whoever reads it will say so
        with path.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
        if pointer:
            raise DamagedFileError(path, "it is a pointer of Git LFS to the file", "`git lfs pull` brings the file")
