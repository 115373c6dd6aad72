"""``wise edit --reproduce``: the shards of a manifest once more, and whether they are the same to the byte."""

from dataclasses import replace
from pathlib import Path

from wisecli.artifacts.memory_manifest import MANIFEST_NAME, Base, Origin, read_manifest
from wisecli.artifacts.shard_manifest import origin_of, read_shard_directory
from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.edit.writing import run
from wisecli.config import EditSettings, LoadOptions, settings_from
from wisecli.editing.run.job import Job, settings_at
from wisecli.errors import SettingsError
from wisecli.models.layout.site import Site
from wisecli.progress import ProgressCallback, ignore_progress


def reproduce(
    manifest: Path,
    output: Path,
    *,
    model: str | None = None,
    load: LoadOptions = LoadOptions(),
    options: RunOptions = RunOptions(),
    on_progress: ProgressCallback = ignore_progress,
) -> EditReport:
    """Write the shards of ``shards.json``, or those that the memory of ``router.json`` was merged from, once more.

    Args:
        manifest: either file, or the directory it lies in.
        model: where the base model is now, if not where the manifest says.
        load: device, type and revision are the manifest's.
        options: all shards are written, whatever ``only`` and ``strict`` say.

    Raises:
        SettingsError: the memory was merged from several directories of shards.
        WiseError: as of :func:`wisecli.commands.edit.edit`.
    """
    directory = manifest if manifest.is_dir() else manifest.parent
    site: Site
    if (directory / MANIFEST_NAME).is_file() if manifest.is_dir() else manifest.name == MANIFEST_NAME:
        listed = read_manifest(directory)
        if len(listed.origins) != 1:
            raise SettingsError(
                f"{manifest}: merged from {len(listed.origins)} directories; give each one's shards.json"
            )
        base, origin, site = listed.base, listed.origins[0], listed.site
        known = {edit.id: edit for edit in (*listed.edits, *origin.left_out)}
    else:
        shards = read_shard_directory(directory)
        base = Base(shards.model, shards.revision, shards.fingerprint.matrix, shards.fingerprint.config)
        origin, site, known = origin_of(shards), shards.site, {edit.id: edit for edit in shards.edits}
    made = origin.made
    job = Job(
        model=model or base.model,
        settings=settings_from(EditSettings, settings_at(site, origin.settings)),
        edits=tuple(known[name] for name in origin.edits),
        load=replace(load, device=made.device, dtype=made.dtype, revision=base.revision, date=made.date),
        target_module=made.target_module,
        threads=made.threads,
    )
    report = run(job, output, replace(options, only=(1, 1), strict=False), on_progress=on_progress)
    return report if options.dry_run else replace(report, differing=_differing(output, origin))


def _differing(output: Path, origin: Origin) -> tuple[str, ...]:
    entries = read_shard_directory(output).shards
    wanted = dict.fromkeys(origin.sha256)
    return tuple(entry.file for entry in entries if entry.sha256 not in wanted)
