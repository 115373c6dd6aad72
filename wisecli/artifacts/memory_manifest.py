"""``router.json``: what a memory is about, how its router was calibrated, and what it was made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from wisecli.artifacts import file_names
from wisecli.artifacts.former_names import current_manifest, current_name
from wisecli.artifacts.tensor_schema import layouts, memory_rows, require_layout
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError, WrongDirectoryError
from wisecli.io.checkpoint import load_tensors, read_json, save_tensors, write_json
from wisecli.io.digest import sha256_file
from wisecli.io.json_schema import CLOSED, OPEN, decode, shown
from wisecli.io.safe_paths import inside
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.site import Fingerprint, Site, StoredSite, check_site
from wisecli.routing.memories.calibration import Calibration
from wisecli.routing.memories.side_memory import NORM, SideMemory, require_router

MANIFEST_NAME = file_names.MEMORY
MEMORY_NAME = "memory.safetensors"
SCHEMA, FORMER_SCHEMA = "wise.memory/2", "wise.memory/1"


@dataclass(frozen=True)
class Made:
    """What else decides the bytes of shards: the process that wrote them, and the options that it loaded the model by.

    ``threads`` decides the order in which numbers are added up. ``sample`` is a digest of one row of every tensor of
    the base model, ``date`` the day that the chat template was told; older versions did not keep them.
    """

    __pydantic_config__ = CLOSED

    device: str
    dtype: str
    threads: int
    target_module: str | None = None
    sample: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class Origin:
    """Shards that a memory was merged from, with everything that it takes to write them again.

    ``edits`` are ids, in order; those of them that no shard holds are in ``left_out``. ``sha256`` are the shard files',
    ``manifest`` that of their ``shards.json``, which older versions did not keep.
    """

    __pydantic_config__ = CLOSED

    path: str
    settings: dict[str, Any]
    made: Made
    edits: tuple[str, ...]
    left_out: tuple[Edit, ...]
    sha256: tuple[str, ...]
    versions: dict[str, str]
    manifest: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything ``router.json`` says of a memory."""

    model: str
    revision: str | None
    fingerprint: Fingerprint
    site: Site
    memory: SideMemory
    calibrations: tuple[Calibration, ...]
    owners: tuple[tuple[str, ...], ...]
    merge: dict[str, Any]
    edits: tuple[Edit, ...]
    versions: dict[str, str]
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class Base:
    """The base model as manifests name it: directory or hub id, revision and fingerprint."""

    __pydantic_config__ = CLOSED

    model: str
    revision: str | None
    matrix: str
    config: str

    @property
    def fingerprint(self) -> Fingerprint:
        """The part that identifies the model."""
        return Fingerprint(self.matrix, self.config)


@dataclass(frozen=True)
class MemoryEntry(Calibration):
    """One memory as ``router.json`` lists it: its calibration, and the ids of its edits."""

    __pydantic_config__ = OPEN

    kind: Literal["matrix", "lookup"]
    router: Literal["norm", "late-interaction"]
    edits: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """Where the memory's tensors are, and what :meth:`SideMemory.describe` says; a tensor's type, then its shape."""

    __pydantic_config__ = OPEN

    file: str
    prefix: str
    thresholds: tuple[float, ...]
    router: Literal["norm", "late-interaction"]
    pooling: Literal["last", "mean"]
    kind: Literal["matrix", "lookup"]
    tensors: dict[str, tuple[str | int, ...]]
    state_layer: Annotated[int, Field(ge=0)] | None = None
    gate_layer: Annotated[int, Field(ge=0)] | None = None
    activated: bool | None = None

    @property
    def layouts(self) -> dict[str, TensorLayout]:
        """Type and shape of every tensor."""
        found = {}
        for name, (dtype, *shape) in self.tensors.items():
            sizes = tuple(size for size in shape if isinstance(size, int) and size >= 0)
            if not isinstance(dtype, str) or len(sizes) != len(shape):
                raise ValueError(f"`memory.tensors.{shown(name)}` is no type with a shape")
            found[name] = TensorLayout(dtype, sizes)
        return found


@dataclass(frozen=True)
class MemoryManifest:
    """``router.json`` as it is written, every field checked."""

    __pydantic_config__ = OPEN

    base: Base
    site: StoredSite
    memories: tuple[MemoryEntry, ...]
    memory: Stored
    merge: dict[str, Any]
    edits: tuple[Edit, ...]
    sha256: dict[str, str]
    versions: dict[str, str]
    origins: tuple[Origin, ...] = ()
    sealed: bool = False

    def check(self) -> None:
        """Check what types do not say: that the parts belong together.

        Raises:
            ValueError: saying which do not.
        """
        check_site(self.site)
        known, stored = {edit.id for edit in self.edits}, self.memory
        owned = [name for entry in self.memories for name in entry.edits]
        if len(known) != len(self.edits) or len(set(owned)) != len(owned) or not known >= set(owned):
            raise ValueError("`edits` and the edits of `memories` do not agree")
        require_router(asdict(stored))
        if min(stored.thresholds, default=0.0) <= 0 or not self.memories:
            raise ValueError("`memory.thresholds` must be above zero")
        if stored.router == NORM and len(stored.thresholds) != len(self.memories):
            raise ValueError("`memory.thresholds` are not as many as there are memories")
        shares = [share for entry in self.memories for share in (*entry.edit_scores, *entry.unrelated_scores)]
        if not all(share.replace(".", "", 1).isdecimal() for share in shares):
            raise ValueError("the quantiles of `memories` are not all at numbers")
        if self.memory.file not in self.sha256:
            raise ValueError("`sha256` has no entry for `memory.file`")
        if not stored.layouts.keys() == memory_rows(stored.kind, stored.tensors).keys():
            raise ValueError(f"`memory.tensors` are not those of a {stored.kind}")


def write_memory(directory: Path, manifest: Manifest, *, sealed: bool = False) -> str:
    """Write a memory's tensors and ``router.json`` into a directory, and return the digest of the tensors' file.

    Args:
        sealed: whether a list of the digests of all files is to follow.
    """
    digest = write_tensors(directory, manifest)
    write_manifest(directory, manifest, {MEMORY_NAME: digest}, sealed=sealed)
    return digest


def write_tensors(directory: Path, manifest: Manifest, *, file: str = MEMORY_NAME, prefix: str = "") -> str:
    """Write a memory's tensors alone, their names prefixed, and return the file's digest."""
    path = directory / file
    save_tensors(path, {prefix + name: tensor for name, tensor in manifest.memory.tensors.items()})
    return sha256_file(path)


def write_manifest(
    directory: Path,
    manifest: Manifest,
    digests: Mapping[str, str],
    *,
    file: str = MEMORY_NAME,
    prefix: str = "",
    sealed: bool = False,
) -> None:
    """Write ``router.json``; everything else as of :func:`write_memory`.

    Args:
        digests: those of files that it is to list, by name.
    """
    described = manifest.memory.describe()
    kind = {name: described[name] for name in ("kind", "router")}
    memories = [
        {**kind, "edits": list(owned), **asdict(calibration)}
        for owned, calibration in zip(manifest.owners, manifest.calibrations, strict=True)
    ]
    content = {
        "schema": SCHEMA,
        "base": {"model": manifest.model, "revision": manifest.revision, **manifest.fingerprint.as_dict()},
        "site": manifest.site.as_dict(),
        "memories": memories,
        "memory": {"file": file, "prefix": prefix, **described},
        "merge": manifest.merge,
        "edits": [edit.as_dict() for edit in manifest.edits],
        "sha256": dict(digests),
        "versions": manifest.versions,
        "origins": [asdict(origin) for origin in manifest.origins],
        "sealed": sealed,
    }
    write_json(directory / MANIFEST_NAME, content)


def read_manifest(directory: Path) -> MemoryManifest:
    """Read and check ``router.json`` alone.

    Raises:
        DamagedFileError: it is missing or not what ``wise merge`` writes.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        wanted = "a memory that `wise merge` wrote, or a checkpoint of `wise export --format routed`"
        raise WrongDirectoryError(directory, file_names.what_is_at(directory), wanted)
    content = read_json(path)
    schema = content.get("schema")
    if schema not in (SCHEMA, FORMER_SCHEMA):
        raise DamagedFileError(path, f"its schema is {shown(schema)}, not {SCHEMA!r}", "merge anew")
    try:
        manifest = decode(MemoryManifest, content if schema == SCHEMA else current_manifest(content))
        manifest.check()
    except ValueError as error:
        raise DamagedFileError(path, f"an entry is missing or wrong ({error})", "merge anew") from None
    return manifest


def read_memory(directory: Path, *, check: bool = True, listed: MemoryManifest | None = None) -> Manifest:
    """Read ``router.json`` and the memory's tensors, checking their digest, shapes and types.

    Args:
        check: whether the digest is checked, if that was not just done.
        listed: what ``router.json`` says, if that was just read.

    Raises:
        DamagedFileError: a file is missing, truncated or altered, or one does not fit the other.
    """
    listed = listed or read_manifest(directory)
    stored, site, fields = listed.memory, listed.site, Calibration.__dataclass_fields__
    path = inside(directory, stored.file)
    loaded = load_tensors(path, digest=listed.sha256[stored.file] if check else None)
    tensors = {current_name(name.removeprefix(stored.prefix)): tensor for name, tensor in loaded.items()}
    if layouts(tensors) != stored.layouts:
        raise DamagedFileError(path, f"its tensors are not those that {MANIFEST_NAME} describes", "merge anew")
    known = {"d": site.d, "d_ff": site.width, "M": len(stored.thresholds)}
    require_layout(path, tensors, memory_rows(stored.kind, tensors), known)
    return Manifest(
        listed.base.model,
        listed.base.revision,
        listed.base.fingerprint,
        site,
        SideMemory.from_description(asdict(stored), tensors),
        tuple(Calibration(**{name: getattr(entry, name) for name in fields}) for entry in listed.memories),
        tuple(entry.edits for entry in listed.memories),
        listed.merge,
        listed.edits,
        listed.versions,
        listed.origins,
    )
