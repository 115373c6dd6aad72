"""What an export is made of, as its manifest records it, and in what another differs."""

from pathlib import Path
from typing import Any

from wisecli.artifacts import file_names
from wisecli.artifacts.checksums import HAS_CHECKSUMS, altered, check_checksums
from wisecli.artifacts.memory_manifest import MANIFEST_NAME
from wisecli.artifacts.up_to_date import up_to_date
from wisecli.environment import versions
from wisecli.errors import OutputExistsError, ProtectedOutputError
from wisecli.export.routed.checkpoint import side_files
from wisecli.io.checkpoint import EXPORT_RECORD, Checkpoint, read_json
from wisecli.io.digest import sha256_file, sha256_json
from wisecli.io.json_schema import shown

# What is compared by its digest, as a message calls it.
_COMPARED = {
    "memory": "the memory is another",
    "weights": "weights of the base model have changed",
    "files": "files of the base model have changed",
    "figures": "the figures of --metrics are others",
}


def export_record(memory: str, checkpoint: Checkpoint, settings: dict[str, Any], figures: object) -> dict[str, Any]:
    """Return what identifies an export's sources and settings, as its manifest stores it.

    Args:
        memory: digest of its manifest.
        settings: what was asked for; of JSON's types.
        figures: what the model card says was measured.
    """
    base = checkpoint.directory
    files = {path.name: sha256_file(path) for path in (*side_files(base), base / "config.json")}
    return {
        **settings,
        "base": base.name,
        "memory": memory,
        "weights": checkpoint.sample,
        "files": sha256_json(files),
        "figures": None if figures is None else sha256_json(figures),
        "versions": versions(),
    }


def manifest_name(output: Path) -> str | None:
    """Return the name of the manifest of an export of any form, if one is there."""
    return next((name for name in (file_names.MERGED, MANIFEST_NAME) if (output / name).is_file()), None)


def require_no_memory(output: Path) -> None:
    """Check that no memory would be replaced.

    Raises:
        ProtectedOutputError: it is one, as `wise merge` writes it.
    """
    if manifest_name(output) != MANIFEST_NAME:
        return
    content = read_json(output / MANIFEST_NAME)
    if content.get(HAS_CHECKSUMS) and EXPORT_RECORD not in content:
        raise ProtectedOutputError(output, "is a memory, and no export")


def up_to_date_export(output: Path, record: dict[str, Any], *, signed: bool = False) -> dict[str, Any] | None:
    """Return the record of the export at ``output`` if it is what this one asks for; ``None`` if none is there.

    Args:
        signed: whether it is to be signed.

    Raises:
        OutputExistsError: it is another, or damaged; naming what differs.
    """
    name = manifest_name(output)
    if name is None:
        return None

    def read(directory: Path) -> dict[str, Any]:
        before = read_json(directory / name).get(EXPORT_RECORD)
        if not isinstance(before, dict):
            raise OutputExistsError(directory)
        if before.get("by"):
            raise OutputExistsError(directory, [f"it was written by {shown(before['by'])}, and not by `wise export`"])
        return before

    def changes(before: dict[str, Any]) -> list[str]:
        return _changes(before, record)

    def damage(_before: dict[str, Any]) -> list[str]:
        return altered(check_checksums(output, expected=True))

    return up_to_date(output / name, read, changes, damage, signed=signed)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return each difference between an export and what is asked for, as a phrase."""
    found = [_COMPARED.get(name, f"{name} was {before.get(name)}, now {now[name]}") for name in _settings(before, now)]
    then = before.get("versions")
    then = then if isinstance(then, dict) else {}
    return found + [
        f"{name} was {then.get(name, 'missing')}, now {version}"
        for name, version in now["versions"].items()
        if then.get(name) != version
    ]


def _settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name, value in now.items() if name != "versions" and before.get(name) != value]
