"""Whether the shards that a command asks for are there already: the same edits, settings and model, and whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wisecli.artifacts.shard_manifest import MANIFEST_NAME, UNRELATED_NAME, ShardDirectory, read_shard_directory
from wisecli.editing.run.worker import Worker, differences
from wisecli.errors import DamagedFileError, OutputExistsError
from wisecli.io.digest import sha256_file
from wisecli.io.safe_paths import inside


def up_to_date_shards(worker: Worker, output: Path, *, skip_known: bool = False) -> ShardDirectory | None:
    """The shards at ``output`` if they are what a worker would write, or ``None`` if no shards are there.

    The model is not loaded.

    Args:
        skip_known: whether edits that the model knows are still to be left out of the job's.

    Raises:
        OutputExistsError: the shards are others, or damaged; naming what differs.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        found = read_shard_directory(output)
    except DamagedFileError as error:
        raise OutputExistsError(output, [str(error)]) from None
    known = set(found.known or ())
    if skip_known and found.known is not None:
        left = tuple(edit for edit in worker.job.edits if edit not in known)
        worker = Worker(replace(worker.job, edits=left, known=found.known), worker.on_progress, base=worker.base)
    changes = differences(found, worker)
    if skip_known and found.known is None:
        changes.append("what the model knew was trained, too")
    if changes := changes or altered_files(found):
        raise OutputExistsError(output, changes)
    return found


def altered_files(directory: ShardDirectory) -> list[str]:
    """The files of shards that are not those that their manifest names, each as a phrase."""
    digests = {entry.file: entry.sha256 for entry in directory.shards} | {UNRELATED_NAME: directory.unrelated_sha256}
    return [f"{name} is not as it was written" for name, digest in digests.items() if not _is(directory, name, digest)]


def _is(directory: ShardDirectory, name: str, digest: str) -> bool:
    path = inside(directory.path, name)
    return path.is_file() and sha256_file(path) == digest
