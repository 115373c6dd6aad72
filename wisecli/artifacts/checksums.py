"""``SHA256SUMS``: the digest of every file of a memory or an export, so that no byte of any changes unseen.

It is what ``sha256sum`` writes, and ``sha256sum -c SHA256SUMS`` reads it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from wisecli.artifacts.integrity import Check, check_digest, damaged
from wisecli.edits.checks.signatures import Signed, SigningKey
from wisecli.errors import DamagedFileError
from wisecli.io.digest import sha256_file
from wisecli.io.safe_paths import require_regular

CHECKSUMS = "SHA256SUMS"
# What `ssh-keygen -Y sign` and `minisign -S` write beside it.
SIGNATURE_NAMES = (f"{CHECKSUMS}.sig", f"{CHECKSUMS}.minisig")
# The key by which a manifest says that it was sealed.
HAS_CHECKSUMS = "sealed"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")
# What Git and the hub's client keep in a directory; nothing of it is ever read.
_NOT_OURS = (".git", ".gitattributes", ".gitignore", ".cache")
# Files that are read at a time: so many keep a disk or two cores busy.
_AT_A_TIME = 2
_REMEDY = "restore it from a copy, or make it anew"


def write_checksums(
    directory: Path, key: SigningKey | None = None, *, known: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the digests of all files in a directory and below; the last file to be written into it but for a signature.

    Args:
        key: what the list is to be signed with.
        known: digests that were taken already, by the file's name.

    Raises:
        SettingsError: the key does not sign.
    """
    taken: dict[tuple[int, int], str] = {}
    found: dict[str, str] = {}
    for name in _files(directory):
        status = (directory / name).stat()
        inode = status.st_dev, status.st_ino
        if inode not in taken:
            taken[inode] = known.get(name) or sha256_file(directory / name)
        found[name] = taken[inode]
    (directory / CHECKSUMS).write_bytes(_rendered(found))
    if key is not None:
        key.sign(directory / CHECKSUMS)


def read_checksums(directory: Path) -> dict[str, str]:
    """Return the digest of every file of a directory, by its name.

    Raises:
        DamagedFileError: the list is missing, or not to the byte as it is written.
    """
    path = directory / CHECKSUMS
    require_regular(path)
    content = path.read_bytes()
    found = {name: digest for digest, name in _LINE.findall(content.decode(errors="surrogateescape"))}
    if not found or _rendered(found) != content:
        raise DamagedFileError(path, "it is no list of digests as it was written", _REMEDY)
    return found


def has_checksums(directory: Path) -> bool:
    """Return whether a directory has a list of digests."""
    path = directory / CHECKSUMS
    return path.exists() or path.is_symlink()


def is_signed(directory: Path) -> bool:
    """Return whether the list of digests has a signature beside it."""
    return any((directory / name).is_file() for name in SIGNATURE_NAMES)


def require_signature(directory: Path, signed: Signed | None) -> None:
    """Check that a directory's list of digests was signed, if it must have been.

    Raises:
        SignatureError: it was not, or that cannot be found out.
        DamagedFileError: there is no such list.
    """
    if signed is not None:
        require_regular(directory / CHECKSUMS)
        signed.require(directory / CHECKSUMS, (directory / CHECKSUMS).read_bytes())


def check_checksums(
    directory: Path, *, expected: bool = False, known: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Check]:
    """Yield a check of every file of a directory against its digest.

    Args:
        expected: whether the list of digests must be there; directories of older versions have none.
        known: digests that were just taken, by the file's name.
    """
    if not has_checksums(directory) and not expected:
        yield Check(
            "sha256 of all files", CHECKSUMS, "unchecked", found="there is none, as an older version wrote this"
        )
        return
    try:
        digests = read_checksums(directory)
    except DamagedFileError as error:
        yield damaged(CHECKSUMS, error)
        return

    def check(name: str, digest: str) -> Iterable[Check]:
        return [Check("sha256", name)] if known.get(name) == digest else [*check_digest(directory, name, digest)]

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        yield from chain.from_iterable(pool.map(check, digests.keys(), digests.values()))
    for name in sorted(set(_files(directory)) - digests.keys()):
        yield Check("sha256", name, "unchecked", found=f"{CHECKSUMS} has no digest of it")


def altered(checks: Iterable[Check], *, but: Collection[str] = ()) -> list[str]:
    """Return the files that are not as they were written, each as a phrase.

    Args:
        checks: of all files, as of :func:`check_checksums`.
        but: names of files that may differ.
    """
    wrong = [check.file for check in checks if check.state == "differs"]
    return [f"{name} is not as it was written" for name in wrong if name not in but]


def require_checksums(
    directory: Path,
    *,
    expected: bool = False,
    but: Collection[str] = (),
    known: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Check that all files of a directory are as they were written; of an older version's there is nothing to check.

    Args:
        expected, known: as of :func:`check_checksums`.
        but: names of files that may differ.

    Raises:
        DamagedFileError: naming those that are not.
    """
    if wrong := altered(check_checksums(directory, expected=expected, known=known), but=but):
        raise DamagedFileError(directory, "; ".join(wrong), _REMEDY)


def _rendered(digests: Mapping[str, str]) -> bytes:
    lines = (f"{digests[name]}  {name}\n" for name in sorted(digests))
    return "".join(lines).encode(errors="surrogateescape")


def _files(directory: Path) -> Iterator[str]:
    """Yield the names of all files in a directory and below, but for the list and its signatures."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        kept = path.relative_to(directory).parts[0] in _NOT_OURS
        if not path.is_dir() and not kept and name not in (CHECKSUMS, *SIGNATURE_NAMES):
            yield name
