"""What kind of directory a path is: of shards, a memory, or a routed checkpoint that ``wise export`` wrote."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

from wisecli.artifacts import shard_manifest
from wisecli.artifacts.file_names import MERGED, kind_at, what_is_at
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, Manifest, read_memory
from wisecli.errors import DamagedFileError, ModelError, WiseError
from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.io.consistent_read import read_consistently
from wisecli.io.safe_paths import inside
from wisecli.models.loading import is_exported, require_base
from wisecli.models.model_files import find_model

Kind = Literal["shards", "memory", "exported"]


def kind_of(path: Path) -> Kind:
    """Tell a directory's kind by the names of its files; nothing is opened.

    Raises:
        ModelError: it is none of the three.
        DamagedFileError: the path cannot be looked at.
    """
    try:
        kind = kind_at(path)
    except (OSError, ValueError) as error:
        raise DamagedFileError(path, f"cannot be looked at ({error})", "check the path") from None
    if kind in ("shards", "memory", "exported"):
        return kind
    neither = f"holds neither {shard_manifest.MANIFEST_NAME} nor {MANIFEST_NAME}"
    what = what_is_at(path) if kind in ("nothing", "file") else neither
    written = "a directory that `wise edit`, `wise merge` or `wise export --format routed` wrote"
    raise ModelError(f"{path} {what}; give {written}")


def holds_merged(path: Path) -> bool:
    """Return whether a directory is a checkpoint with its edits merged into its weights, without a router."""
    with suppress(OSError, ValueError):
        return (path / MERGED).is_file() and not (path / MANIFEST_NAME).exists()
    return False


def written_form(path: Path) -> Literal["merged", "stock", "gguf"] | None:
    """Return the form that a checkpoint without a router records; ``None`` for anything else."""
    format_name = None
    with suppress(WiseError):  # that it is damaged is for others to find
        if not holds_merged(path):
            return None
        format_name = read_json(path / MERGED).get("format")
    return format_name if format_name in ("stock", "gguf") else "merged"


def find_base(memory: Path, model: str | None) -> tuple[Path, Manifest]:
    """Return the base model's directory and the manifest of a memory, or of an exported directory.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    manifest, exported = read_consistently(memory, lambda: (read_memory(memory), is_exported(memory)))
    return base_of(memory, manifest, model, exported=exported), manifest


def base_of(memory: Path, manifest: Manifest, model: str | None, *, exported: bool) -> Path:
    """Return the directory of the base model that a memory is for: its own, if it was exported and no model is named.

    Raises:
        WiseError: the model cannot be read, or is another.
    """
    own = exported and model is None
    directory = memory if own else find_model(model or manifest.model, revision=manifest.revision)
    checkpoint = Checkpoint(directory)
    if directory == memory:
        for path in checkpoint.files:
            inside(directory, path.name)
    require_base(directory, checkpoint, manifest.site, manifest.fingerprint)
    return directory


def locate_memory(model: str | None, memory: Path | None, fallback: Path) -> tuple[Path, str | None]:
    """Return which directory holds the memory, and which model it is for, from what the command line gave.

    A model that is an exported directory holds its own memory.

    Raises:
        ModelError: there is no memory to be found.
    """
    if memory is not None:
        return memory, model
    if model is not None and any((Path(model) / name).is_file() for name in (MANIFEST_NAME, MERGED)):
        return Path(model), None
    if (fallback / MANIFEST_NAME).is_file():
        return fallback, model
    raise ModelError(f"there is no memory in {fallback}; run `wise merge` first or pass --memory")
