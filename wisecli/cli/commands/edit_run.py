"""What ``wise edit`` does with what its options say, and what it prints of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.cli.commands.draft import draw_edits
from wisecli.cli.commands.memory import ReportPrinter
from wisecli.cli.console import Console, count, sifted_json, sifted_lines, would_write
from wisecli.cli.edit_lines import consequence_lines
from wisecli.commands.outputs import shards_output
from wisecli.config import EditSettings, LoadOptions
from wisecli.edits.text import edits_with
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit.edit_report import EditReport
    from wisecli.commands.edit.run_options import RunOptions
    from wisecli.editing.run.resource_estimate import Plan
    from wisecli.edits.checks.admission import Admission, Sheet
    from wisecli.edits.checks.signatures import SigningKey


@dataclass(frozen=True)
class EditRun:
    """One run of ``wise edit``: a model, edits, and how they are trained."""

    console: Console
    model: str | None
    edits: Path | None
    load: LoadOptions
    options: RunOptions
    admission: Admission

    def drawn_from(self, page: Path, *, yes: bool) -> EditRun | None:
        """Return the same run with edits drawn from a document, or None if none are left.

        Raises:
            SettingsError: what is asked for is not for documents.
        """
        if self.admission.signed is not None:
            raise SettingsError("--verify-signature is for files of edits; `wise draft` writes one that can be signed")
        if self.model is None:
            raise SettingsError("--from-text needs a MODEL, which draws the edits from the document")
        if self.options.dry_run:
            raise SettingsError("--dry-run plans a file of edits; draw it first, with `wise draft`")
        force = self.options.force
        edits = draw_edits(
            self.console, self.model, page, self.edits, load=self.load, yes=yes, force=force, trains=True
        )
        return None if edits is None else replace(self, edits=edits)

    def into(
        self,
        memory: Path,
        flags: Mapping[str, Any],
        *,
        config: Path | None,
        who: str | None,
        reason: str,
        key: SigningKey | None,
        every: float | None,
    ) -> None:
        """Make the edits the next release of a memory; with ``every``, in seconds, continue with lines that are added.

        Raises:
            SettingsError: the model or the edits are missing.
            EditFileError: the edits cannot be used.
        """
        if self.model is None or self.edits is None:
            raise SettingsError("--into needs a MODEL and a file of EDITS, or - for a pipe")
        sheet = self._sheet(self.edits) if every is None else None
        from wisecli.commands.edit.edit_into import Batch, IntoMemory, edit_into
        from wisecli.commands.edit.watch import follow
        from wisecli.memory.history.release_log import Provenance

        made = Provenance(who, reason, key)
        into = IntoMemory(self.model, memory, flags, config, made, self.load, self.options, self.admission)
        printer = ReportPrinter(self.console)
        if sheet is not None:
            with self.console.watching() as on_progress:
                report = edit_into(into, Batch.of(sheet), on_progress=on_progress)
            printer.landed(report)
        elif every is not None:
            if self.admission.signed is not None:
                raise SettingsError("--verify-signature is for a whole file, not for one that --watch sees grow")
            with self.console.watching() as on_progress:
                for report in follow(into, self.edits, interval=every, on_progress=on_progress):
                    printer.landed(report)

    def again(self, manifest: Path, output: Path) -> None:
        """Write the shards of a manifest once more.

        Raises:
            SettingsError: something is asked of the edits, as of new ones.
        """
        from wisecli.edits.checks.admission import DEFAULT_ADMISSION

        if self.admission != DEFAULT_ADMISSION:
            raise SettingsError("--reproduce writes what was written once; drop what is asked of new edits")
        self._require_free(output)
        from wisecli.commands.edit.reproduce import reproduce

        with self.console.watching() as on_progress:
            report = reproduce(
                manifest, output, model=self.model, load=self.load, options=self.options, on_progress=on_progress
            )
        tell_edit(self.console, report)
        report.check()

    def write_shards(self, output: Path, settings: EditSettings, target_module: str | None) -> None:
        """Write the edits into shards.

        Raises:
            SettingsError: the model or the edits are missing.
            EditFileError: the edits cannot be used.
            OutputExistsError: the output is there already.
            ProtectedOutputError: the output is there, and not to be replaced.
        """
        if self.model is None or self.edits is None:
            raise SettingsError("give a MODEL and a file of EDITS, or --reproduce and a manifest")
        sheet = self._sheet(self.edits)
        self._require_free(output, self.edits)
        from wisecli.commands.edit.edit import edit

        with self.console.watching() as on_progress:
            report = edit(
                self.model,
                self.edits,
                output,
                settings,
                load=self.load,
                target_module=target_module,
                options=self.options,
                admission=self.admission,
                sheet=sheet,
                on_progress=on_progress,
            )
        tell_edit(self.console, report, taken=sheet.taken if report.planned else ())
        report.check()

    def _sheet(self, edits: Path) -> Sheet:
        """Return what a file of edits holds, or what comes through the pipe."""
        if str(edits) == "-" and sys.stdin is None:
            raise SettingsError("there is no pipe to read edits from; name a file")
        if str(edits) == "-":
            sheet = self.admission.parse(Path("<stdin>"), sys.stdin.buffer.read())
        else:
            sheet = self.admission.read(edits)
        self.console.warn(sheet.passed_over)
        return sheet

    def _require_free(self, output: Path, *inputs: Path) -> None:
        """Refuse an output that cannot be written, unless others may have written it as parts of this one."""
        if self.options.only == (1, 1):
            shards_output(output, self.model, *inputs, force=self.options.force).require_unless_kept()


def tell_edit(console: Console, report: EditReport, *, taken: Sequence[str] = ()) -> None:
    """Print what ``wise edit`` did.

    Args:
        taken: sentences on what was taken from files in layouts of others.
    """
    content = {"results": {**_edit_json(report), **({"taken": list(taken)} if taken else {})}}
    written = edits_with(report.edits, len(report.consequences))
    what = f"{written} in {count(report.shards, 'shard')} of {report.module}"
    if report.plan is None:
        console.result(content, *_edit_lines(what, report))
        return
    more = [*taken, *consequence_lines(report.consequences), *sifted_lines(report.sifted)]
    console.result(content, would_write(what, report), _resident(report.plan), *more)


def _edit_json(report: EditReport) -> dict[str, Any]:
    """Return what ``--json`` prints of a run."""
    results = {name: getattr(report, name) for name in ("edits", "shards", "seconds", "seconds_per_edit")}
    results |= {"peak_rss_bytes": report.peak_rss_bytes, "output": str(report.output), "layer": report.layer}
    results |= {"module": report.module, "untaken": list(report.untaken), "planned": report.planned}
    results |= {"left_out": list(report.left_out), "missing": report.missing, "up_to_date": report.up_to_date}
    results["consequences"] = [edit.as_dict() for edit in report.consequences]
    results["sifted"] = sifted_json(report.sifted)
    if report.peak_vram_bytes:
        results["peak_vram_bytes"] = report.peak_vram_bytes
    if report.differing is not None:
        results["differing"] = list(report.differing)
    if report.plan is not None:
        results["plan"] = asdict(report.plan)
    return results


def _edit_lines(what: str, report: EditReport) -> list[str]:
    """Return the lines that are printed of a run."""
    lines = [f"{what} → {report.output}/ ({report.seconds:.1f} s, {report.seconds_per_edit:.2f} s an edit)"]
    if report.missing:
        lines = [f"{what}: {count(report.missing, 'shard')} still to be written by others ({report.seconds:.1f} s)"]
    if not report.edits and not report.consequences:
        lines = [f"there is nothing to train, and nothing was written ({report.seconds:.1f} s)"]
    if report.up_to_date:
        lines = [f"{what} → {report.output}/: up to date, nothing was written ({report.seconds:.1f} s)"]
    lines += consequence_lines(report.consequences)
    lines += sifted_lines(report.sifted)
    if report.differing == ():
        lines.append("byte for byte the shards of the manifest")
    lines += [f"left out, as the model gives nothing finite: {name}" for name in report.left_out]
    lines += [f"did not take: {name}" for name in report.untaken]
    if missed := len(report.untaken) + len(report.left_out):
        lines.append(f"{missed} of {count(report.edits + len(report.consequences), 'edit')} did not take")
    return lines


def _resident(plan: Plan) -> str:
    """Return what a planned run would hold, read and compute."""
    weights, work = f"{plan.weights / 2**30:.2f} GiB of weights", f"{plan.flops / 1e12:.1f} TFLOP"
    if not plan.streamed:
        return f"{weights} stay in memory; {work}"
    return (
        f"of {weights} {plan.resident / 2**30:.2f} stay in memory, later {plan.held / 2**30:.2f} more above the edit; "
        f"the others pass through, {plan.layer / 2**30:.2f} at a time and {plan.read / 2**30:.0f} in all; "
        f"{plan.spooled / 2**30:.2f} GiB of disk meanwhile; {work}"
    )
