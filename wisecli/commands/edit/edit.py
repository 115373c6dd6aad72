"""``wise edit``: edits → shards."""

import time
from dataclasses import replace
from pathlib import Path

from wisecli.commands.edit.edit_report import EditReport
from wisecli.commands.edit.planning import free_site, nothing_to_do, output_of, planned, warn_of_unnamed
from wisecli.commands.edit.run_options import RunOptions
from wisecli.config import EditSettings, LoadOptions
from wisecli.editing.run.base_model import Base
from wisecli.editing.run.job import Job
from wisecli.edits.checks.admission import DEFAULT_ADMISSION, Admission, Sheet
from wisecli.progress import ProgressCallback, ignore_progress


def edit(
    model: str,
    edits_file: Path,
    output: Path,
    settings: EditSettings,
    *,
    load: LoadOptions = LoadOptions(),
    target_module: str | None = None,
    options: RunOptions = RunOptions(),
    admission: Admission = DEFAULT_ADMISSION,
    sheet: Sheet | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> EditReport:
    """Write each shard of edits into a delta of the model's value matrix.

    A run that was broken off goes on where it was if it is asked for again; one that was finished has nothing to do.

    Args:
        model: a directory, a hub id or a GGUF file.
        target_module: path of the value matrix, with ``{layer}`` for the layer's index, where the table's is not meant.
        admission: what is asked of the edits before; what it leaves out with the model's help is planned for all the
            same.
        sheet: what the file holds, if it was read before.

    Raises:
        WiseError: any of the input, the model or the disk cannot be used; nothing is left behind but finished shards.
    """
    started = time.perf_counter()
    sheet = sheet or admission.read(edits_file)
    admitted = admission.admit(sheet.name, sheet.numbered, on_progress=on_progress)
    job = Job(model=model, settings=settings, edits=admitted.edits, load=load, target_module=target_module)
    base = Base(job, on_progress)
    base.reader.require(sheet.name, admitted.numbered, settings, allow_special=admission.allow_special)
    if not options.dry_run or output.exists():
        from wisecli.commands.edit.writing import write  # with torch, which takes seconds and a plan does without

        report = write(base, admitted, edits_file, output, options, skip_known=admission.skip_known)
        return replace(report, seconds=time.perf_counter() - started)
    warn_of_unnamed(base, sheet.name, admitted.numbered)
    output_of(job, output, options, edits_file).require_apart()
    if admitted.numbered:
        report = planned(base, job, free_site(base, job, output, options), output)
    else:
        report = nothing_to_do(base, job, output)
    return replace(report, seconds=time.perf_counter() - started, sifted=admitted.sifted)
