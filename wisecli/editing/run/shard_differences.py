"""In what shards, or the plan for them, differ from what a job asks for."""

from dataclasses import asdict, replace
from pathlib import Path

from wisecli.artifacts.shard_manifest import MANIFEST_NAME, UNRELATED_NAME, ShardDirectory, read_shard_directory
from wisecli.artifacts.up_to_date import up_to_date
from wisecli.editing.run.worker import Worker
from wisecli.edits.edit_differences import describe_differences
from wisecli.environment import changed_versions
from wisecli.io.digest import sha256_file
from wisecli.io.safe_paths import inside
from wisecli.models.layout.site import find_site, fingerprint


def up_to_date_shards(worker: Worker, output: Path, *, skip_known: bool = False) -> ShardDirectory | None:
    """Return the shards at ``output`` if they are what a worker would write; ``None`` if no shards are there.

    The model is not loaded.

    Args:
        skip_known: whether edits that the model knows are still to be left out of the job's.

    Raises:
        OutputExistsError: the shards are others, or damaged; naming what differs.
    """

    def changes(found: ShardDirectory) -> list[str]:
        if not skip_known:
            return differences(found, worker)
        known = set(found.known or ())
        left = tuple(edit for edit in worker.job.edits if edit not in known)
        job = worker.job if found.known is None else replace(worker.job, edits=left, known=found.known)
        differing = differences(found, Worker(job, worker.on_progress, base=worker.base))
        return differing if found.known is not None else [*differing, "what the model knew was trained, too"]

    return up_to_date(output / MANIFEST_NAME, read_shard_directory, changes, altered_files)


def differences(plan: ShardDirectory, worker: Worker) -> list[str]:
    """Return what a job asks for otherwise than a plan that was begun, each as a phrase."""
    job, directory = worker.job, worker.base.checkpoint.directory
    found = []
    layer: str | int = plan.site.layer if job.settings.layer == "auto" else job.settings.layer
    site = find_site(directory, worker.base.checkpoint, layer, worker.base.layout)
    if not site.is_at(plan.site):
        found.append(f"the site was {plan.site.module}, now {site.module}")
    elif fingerprint(directory, worker.base.checkpoint, plan.site) != plan.fingerprint:
        found.append(f"the model {directory} has changed")
    elif plan.made.sample not in (None, worker.base.checkpoint.sample):
        found.append(f"weights of the model {directory} have changed")
    found += describe_differences(plan.edits, job.edits)
    settings = asdict(job.settings)
    for name in settings.keys() | plan.settings.keys():
        before, now = plan.settings.get(name), settings.get(name)
        if before != now:
            found.append(f"{name} was {before}, now {now}")
    load = job.load
    if load.dtype not in ("auto", plan.made.dtype):
        found.append(f"dtype was {plan.made.dtype}, now {load.dtype}")
    if load.device.split(":")[0] not in ("auto", plan.made.device):
        found.append(f"device was {plan.made.device}, now {load.device}")
    return sorted([*found, *changed_versions(plan.versions)])


def altered_files(directory: ShardDirectory) -> list[str]:
    """Return the files of shards that are not those that their manifest names, each as a phrase."""
    digests = {entry.file: entry.sha256 for entry in directory.shards} | {UNRELATED_NAME: directory.unrelated_sha256}
    return [f"{name} is not as it was written" for name, digest in digests.items() if not _is(directory, name, digest)]


def _is(directory: ShardDirectory, name: str, digest: str) -> bool:
    path = inside(directory.path, name)
    return path.is_file() and sha256_file(path) == digest
