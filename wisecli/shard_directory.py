"""``shards.json``: what a directory of shards is about, and the way back to its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wisecli.edits import Edit
from wisecli.errors import DamagedFileError, MismatchedShardsError
from wisecli.shards import MaskKind, Shard, load_shard
from wisecli.site import Fingerprint, Site
from wisecli.storage import read_json, write_json
from wisecli.unrelated import Unrelated, load_unrelated

MANIFEST_NAME = "shards.json"
UNRELATED_NAME = "unrelated.safetensors"
SCHEMA = "wise.shards/1"


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it; ``losses`` holds the mean loss after every pass of training or polish.

    ``penalty`` is λ and w of the closed form, where it was used.
    """

    file: str
    sha256: str
    mask_kind: MaskKind
    edits: tuple[str, ...]
    losses: tuple[float, ...]
    seconds: float
    penalty: tuple[float, float] | None = None


@dataclass(frozen=True)
class ShardDirectory:
    """Everything ``shards.json`` says; ``settings`` are those the shards were written with."""

    path: Path
    model: str
    revision: str | None
    fingerprint: Fingerprint
    site: Site
    settings: dict[str, Any]
    contexts: tuple[str, ...]
    edits: tuple[Edit, ...]
    shards: tuple[ShardEntry, ...]
    unrelated_sha256: str
    versions: dict[str, str]

    def load(self, entry: ShardEntry) -> Shard:
        """Read one shard file, checking its digest."""
        return load_shard(self.path / entry.file, self.site, entry.mask_kind, entry.sha256)

    def load_unrelated(self) -> Unrelated:
        """Read the statistics of unrelated text, checking their digest."""
        return load_unrelated(self.path / UNRELATED_NAME, self.unrelated_sha256)


def write_shard_directory(directory: ShardDirectory) -> None:
    """Write ``shards.json`` beside the shard files."""
    content = {
        "schema": SCHEMA,
        "base": {"model": directory.model, "revision": directory.revision, **directory.fingerprint.as_dict()},
        "site": directory.site.as_dict(),
        "settings": directory.settings,
        "contexts": list(directory.contexts),
        "edits": [edit.as_dict() for edit in directory.edits],
        "shards": [asdict(entry) for entry in directory.shards],
        "unrelated": {"file": UNRELATED_NAME, "sha256": directory.unrelated_sha256},
        "versions": directory.versions,
    }
    write_json(directory.path / MANIFEST_NAME, content)


def read_shard_directory(path: Path) -> ShardDirectory:
    """Read ``shards.json``.

    Raises:
        DamagedFileError: it is missing or not what ``wise edit`` writes.
    """
    if not (path / MANIFEST_NAME).is_file():
        raise DamagedFileError(path, f"there is no {MANIFEST_NAME} in it", "give a directory that `wise edit` wrote")
    content = read_json(path / MANIFEST_NAME)
    if content.get("schema") != SCHEMA:
        raise DamagedFileError(path / MANIFEST_NAME, f"its schema is not {SCHEMA}", "edit anew with this version")
    try:
        base = content["base"]
        return ShardDirectory(
            path,
            base["model"],
            base["revision"],
            Fingerprint(base["matrix"], base["config"]),
            Site(**content["site"]),
            content["settings"],
            tuple(content["contexts"]),
            tuple(Edit.from_dict(edit) for edit in content["edits"]),
            tuple(_entry(record) for record in content["shards"]),
            content["unrelated"]["sha256"],
            content["versions"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(path / MANIFEST_NAME, f"an entry is missing or wrong ({error})", "edit anew") from None


def _entry(record: dict[str, Any]) -> ShardEntry:
    penalty = record["penalty"]
    tuples = {"edits": tuple(record["edits"]), "losses": tuple(record["losses"])}
    return ShardEntry(**{**record, **tuples, "penalty": None if penalty is None else (penalty[0], penalty[1])})


def require_same_site(directories: Sequence[ShardDirectory]) -> None:
    """Check that shards of several directories change the same matrix of the same model.

    Raises:
        MismatchedShardsError: naming the two that differ.
    """
    first = directories[0]
    for other in directories[1:]:
        if other.fingerprint.matrix != first.fingerprint.matrix or other.site != first.site:
            raise MismatchedShardsError(
                f"{first.path} edits layer {first.site.layer} and {other.path} layer {other.site.layer}, or of "
                "different models; merge only shards of one matrix of one model"
            )
    ids = [edit.id for directory in directories for edit in directory.edits]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise MismatchedShardsError(f"edit {twice!r} is in more than one of the shards; merge it only once")
