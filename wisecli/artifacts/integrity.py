"""Single checks of files against what a manifest says of them; each yields what it found, and raises nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wisecli.artifacts.former_names import current_name
from wisecli.artifacts.tensor_schema import TensorRows, differences
from wisecli.errors import WiseError
from wisecli.io.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_tensors, weight_map
from wisecli.io.digest import sha256_file
from wisecli.io.safe_paths import inside, require_regular
from wisecli.io.safetensors_header import TensorLayout, read_header
from wisecli.models.layout.site import Fingerprint, Site, fingerprint

State = Literal["same", "differs", "unchecked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``what`` of a ``file``, or of a ``tensor`` in it.

    Where it differs, or was not checked, ``expected`` and ``found`` say how or why.
    """

    what: str
    file: str
    state: State = "same"
    tensor: str | None = None
    expected: str = ""
    found: str = ""


def damaged(file: str, error: WiseError) -> Check:
    """Return the check of a file that could not be read at all."""
    return Check("readable", file, "differs", expected="a whole file", found=str(error))


def check_digest(directory: Path, file: str, digest: str) -> Iterator[Check]:
    """Yield the check of a file's sha256."""
    try:
        path = inside(directory, file)
        require_regular(path)
        found = sha256_file(path)
    except WiseError as error:
        yield damaged(file, error)
    except OSError as error:
        yield Check("sha256", file, "differs", expected=digest, found=str(error))
    else:
        yield Check("sha256", file) if found == digest else Check("sha256", file, "differs", None, digest, found)


def check_rows(
    directory: Path, file: str, rows: TensorRows, known: Mapping[str, int], prefix: str = ""
) -> Iterator[Check]:
    """Yield checks of a file's tensors against the table of those it should hold."""
    try:
        tensors = read_header(inside(directory, file)).tensors
    except WiseError as error:
        yield damaged(file, error)
        return
    wrong = differences(_unprefixed(tensors, prefix), rows, known)
    yield from (Check("tensors", file, "differs", prefix + name, *pair) for name, *pair in wrong)
    if not wrong:
        yield Check(f"types and shapes of {len(tensors)} tensors", file)
        yield from _finite(inside(directory, file))


def _unprefixed(tensors: Mapping[str, TensorLayout], prefix: str) -> dict[str, TensorLayout]:
    """Return tensors by today's names, without a prefix."""
    return {current_name(name.removeprefix(prefix)): layout for name, layout in tensors.items()}


def _finite(path: Path) -> Iterator[Check]:
    """Yield a failed check for each tensor with NaN or infinite numbers, or one that passes."""
    try:
        with open_tensors(path) as tensors:
            wrong = [name for name in tensors.keys() if not bool(tensors.get_tensor(name).isfinite().all())]  # noqa: SIM118
    except WiseError as error:
        yield damaged(path.name, error)
        return
    yield from (Check("tensors", path.name, "differs", name, "finite numbers", "others") for name in wrong)
    if not wrong:
        yield Check("finite numbers", path.name)


def check_layouts(
    directory: Path, file: str, expected: Mapping[str, TensorLayout], prefix: str = ""
) -> Iterator[Check]:
    """Yield checks of a file's tensors against the types and shapes that a manifest lists by names without a prefix."""
    try:
        tensors = _unprefixed(read_header(inside(directory, file)).tensors, prefix)
    except WiseError as error:
        yield damaged(file, error)
        return
    names = sorted(expected.keys() | tensors.keys())
    wrong = [name for name in names if expected.get(name) != tensors.get(name)]
    for name in wrong:
        pair = (str(side.get(name, "nothing")) for side in (expected, tensors))
        yield Check("tensors", file, "differs", prefix + name, *pair)
    if not wrong:
        yield Check("tensors as the manifest lists them", file)


def check_index(directory: Path) -> Iterator[Check]:
    """Yield checks of a checkpoint's index against the files it names."""
    try:
        listed = weight_map(directory / INDEX_NAME)
    except WiseError as error:
        yield damaged(INDEX_NAME, error)
        return
    wrong = 0
    if (directory / SINGLE_NAME).exists():
        wrong += 1
        yield Check("index", SINGLE_NAME, "differs", expected="nothing, as it goes before the index", found="a file")
    for file in sorted(set(listed.values())):
        try:
            present = read_header(inside(directory, file)).tensors.keys()
        except WiseError as error:
            wrong += 1
            yield damaged(file, error)
            continue
        named = {tensor for tensor, place in listed.items() if place == file}
        for tensor in sorted(named ^ present):
            wrong += 1
            sides = ("in the file", "nothing") if tensor in named else ("nothing", "in the file")
            yield Check("index", file, "differs", tensor, *sides)
    if not wrong:
        yield Check(f"index of {len(listed)} tensors", INDEX_NAME)


def check_base(
    directory: Path, site: Site, expected: Fingerprint, *, settings: bool = True, without: str | None = None
) -> Iterator[Check]:
    """Yield checks of a base model against the fingerprint of the one that was edited.

    Args:
        settings: whether its ``config.json`` is that model's own.
        without: a file of it whose tensors are not that model's.
    """
    name = str(directory)
    try:
        checkpoint = Checkpoint(directory, without=without)
        if (amiss := site.mismatch(checkpoint)) is not None:
            yield Check("base model", name, "differs", *amiss)
            return
        mark = fingerprint(directory, checkpoint, site)
    except WiseError as error:
        yield damaged(name, error)
        return
    if mark.matrix == expected.matrix:
        yield Check(f"{site.what} of the base model", name)
    else:
        yield Check("base model", name, "differs", site.base_name, f"sha256 {expected.matrix}", f"sha256 {mark.matrix}")
    if settings and mark.config == expected.config:
        yield Check("settings of the base model", f"{name}/config.json")
    elif settings:
        sides = f"sha256 {expected.config}", f"sha256 {mark.config}"
        yield Check("settings of the base model", f"{name}/config.json", "differs", None, *sides)
