"""The only place that prints: results on stdout for people or as one JSON object, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wisecli.bench_report import FIGURES
from wisecli.console_gate import sifted_json, sifted_lines
from wisecli.events import NOTE, Event, Watcher

if TYPE_CHECKING:
    from wisecli.manifest import MemoryEntry
    from wisecli.pipeline import (
        Answer,
        BenchReport,
        EditReport,
        EvalReport,
        ExportReport,
        InspectReport,
        MergeReport,
        StudyReport,
        VerifyReport,
    )
    from wisecli.planning import Plan

_LINE_SECONDS = 5.0
_STATES = {"same": "ok", "differs": "DIFFERS", "unchecked": "not checked"}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Console:
    """How a command speaks: ``as_json`` prints one object and nothing else on stdout; ``quiet`` no progress."""

    as_json: bool = False
    quiet: bool = False

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Progress on stderr: bars on a terminal, a line at the end of a stage elsewhere, nothing if quiet."""
        errors = RichConsole(stderr=True)
        if self.quiet:
            yield lambda _event: None
        elif errors.is_terminal and "NO_COLOR" not in os.environ:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=errors) as bars:
                yield _Bars(bars)
        else:
            yield _Lines()

    def result(self, content: dict[str, Any], *renderables: Any) -> None:
        """Print a result: the object as JSON, or what people read."""
        if self.as_json:
            sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
            return
        out = RichConsole(highlight=False, soft_wrap=True)
        for item in renderables:
            out.print(item)

    def edited(self, report: EditReport) -> None:
        """Print what ``wise edit`` did."""
        results = {name: getattr(report, name) for name in ("edits", "shards", "seconds", "seconds_per_edit")}
        results |= {"peak_rss_bytes": report.peak_rss_bytes, "output": str(report.output), "layer": report.layer}
        results |= {"module": report.module, "untaken": list(report.untaken), "planned": report.planned}
        results |= {"left_out": list(report.left_out), "missing": report.missing}
        results["sifted"] = sifted_json(report.sifted)
        if report.differing is not None:
            results["differing"] = list(report.differing)
        what = f"{report.edits} edits in {_count(report.shards, 'shard')} of {report.module}"
        if report.plan is not None:
            results["plan"] = asdict(report.plan)
            sifted = map(Text, sifted_lines(report.sifted))
            self.result({"results": results}, _plan(what, report), Text(_resident(report.plan)), *sifted)
            return
        lines = [f"{what} → {report.output}/ ({report.seconds:.1f} s, {report.seconds_per_edit:.2f} s an edit)"]
        if report.missing:
            lines = [
                f"{what}: {_count(report.missing, 'shard')} still to be written by others ({report.seconds:.1f} s)"
            ]
        if not report.edits:
            lines = [f"there is nothing to train, and nothing was written ({report.seconds:.1f} s)"]
        lines += sifted_lines(report.sifted)
        lines += [f"did not take: {name}" for name in report.untaken]
        if report.differing == ():
            lines.append("byte for byte the shards of the manifest")
        lines += [f"left out, as the model gives nothing finite: {name}" for name in report.left_out]
        self.result({"results": results}, *map(Text, lines))

    def merged(self, report: MergeReport) -> None:
        """Print what ``wise merge`` did."""
        names = ("mode", "method", "shards", "edits", "router", "routing", "seconds", "peak_rss_bytes", "planned")
        results = {name: getattr(report, name) for name in names} | {"output": str(report.output)}
        results["thresholds"] = [calibration.threshold for calibration in report.calibrations]
        results["misses"] = [calibration.misses for calibration in report.calibrations]
        results["false_alarms"] = [calibration.false_alarms for calibration in report.calibrations]
        how = report.method if report.mode == "merge" else report.mode
        what = f"{_count(report.shards, 'shard')}, {report.edits} edits by {how}"
        if report.planned:
            self.result({"results": results}, _plan(what, report))
            return
        lines = [f"{what} → {report.output}/ ({report.seconds:.1f} s)"]
        for number, one in enumerate(report.calibrations):
            lines.append(
                f"memory {number}: router {report.router}, threshold {one.threshold:.4g}; "
                f"edits missed {one.misses:.1%}, false alarms {one.false_alarms:.2%} of tokens"
            )
        self.result({"results": results}, *map(Text, lines))

    def compared(self, report: BenchReport) -> None:
        """Print what ``wise bench`` measured."""
        table = Table(title=f"{report.dataset}, edited by every method")
        for column in ("edits", "method", *FIGURES.values(), "s an edit", "MB"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in report.rows:
            figures = row["figures"]
            if "cannot" in figures:
                table.add_row(str(row["edits"]), row["method"], f"cannot run: {figures['cannot']}")
                continue
            shown = [f"{figures[name]:.3f}" if name in figures else "" for name in FIGURES]
            costs = f"{figures['seconds_per_edit']:.2f}", f"{figures['bytes'] / 1e6:.1f}"
            table.add_row(str(row["edits"]), row["method"], *shown, *costs)
        self.result(report.as_json(), table)

    def studied(self, report: StudyReport) -> None:
        """Print the studies of ``wise bench``, a table each."""
        tables = []
        for section in report.sections():
            table = Table(title=section.title)
            for head in section.heads:
                table.add_column(head, justify="right", overflow="fold")
            for row in section.cells:
                table.add_row(*row)
            tables.append(table)
        self.result(report.as_json(), *tables)

    def evaluated(self, report: EvalReport) -> None:
        """Print what ``wise eval`` measured."""
        table = Table(title=f"{report.dataset}: {report.samples['edits']} edits")
        table.add_column("measure")
        for column in ("before", "after"):
            table.add_column(column, justify="right")
        for name, after in report.after.items():
            table.add_row(name, f"{report.before[name]:.3f}", f"{after:.3f}")
        self.result(report.as_json(), table)

    def exported(self, report: ExportReport) -> None:
        """Print what ``wise export`` wrote."""
        names = ("format", "edits", "bytes", "seconds", "peak_rss_bytes", "locality", "tokens", "pushed", "planned")
        results = {name: getattr(report, name) for name in names} | {"output": str(report.output)}
        what = f"{report.format} {'' if report.format == 'delta' else 'checkpoint '}with {report.edits} edits"
        if report.planned:
            self.result({"results": results}, _plan(what, report))
            return
        lines = [f"{what} → {report.output}/ ({report.bytes / 1e6:.0f} MB, {report.seconds:.1f} s)"]
        if report.locality is not None:
            kept = f"{report.locality:.1%} of {report.tokens} next tokens of unrelated text stay the base model's"
            lines.append(f"always on: {kept}; --format routed leaves unrelated text alone")
        if report.pushed is not None:
            lines.append(f"sent to {report.pushed}")
        self.result({"results": results}, *map(Text, lines))

    def answered(self, answers: Sequence[Answer]) -> None:
        """Print answers, with a table of tokens where they were explained."""
        shown: list[Any] = []
        for answer in answers:
            shown.append(Text(answer.text) if len(answers) == 1 else Text(f"{answer.prompt} → {answer.text}"))
            if answer.steps:
                shown.append(_steps(answer))
        content = [{"prompt": a.prompt, "answer": a.text, "steps": [vars(step) for step in a.steps]} for a in answers]
        self.result({"results": content}, *shown)

    def inspected(self, report: InspectReport) -> None:
        """Print what ``wise inspect`` found."""
        facts = Table(show_header=False, title=plain(f"{report.path}: {report.kind}"))
        for name, value in _facts(report):
            facts.add_row(name, plain(value))
        edits = Table(title=f"{len(report.edits)} of {_count(report.matched, 'edit')}")
        for column in ("id", "prompt", "target", "subject"):
            edits.add_column(column)
        for edit in report.edits:
            edits.add_row(*map(plain, (edit.id, edit.prompt, edit.target, edit.subject or "")))
        scores = [_scores(number, entry) for number, entry in enumerate(report.memories)]
        self.result(report.as_json(), facts, *scores, *([edits] if report.edits else []))

    def verified(self, report: VerifyReport) -> None:
        """Print what ``wise verify`` found, a line a check."""
        lines = []
        for check in report.checks:
            what = f"{check.file}: {check.what}" + (f" {check.tensor}" if check.tensor else "")
            sides = f": expected {check.expected}, found {check.found}" if check.state == "differs" else ""
            why = f": {check.found}" if check.state == "unchecked" else ""
            lines.append(plain(f"{_STATES[check.state]:<11} {what}{sides}{why}"))
        self.result(report.as_json(), *lines)


def fail(message: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr, on one line of its own; before it what it sums up, a line each."""
    for one in details if details[1:] else ():
        sys.stderr.write(f"{plain(one)}\n")
    sys.stderr.write(f"error: {plain(message)}\n")


def quiet_libraries() -> None:
    """Keep what libraries say on their own out of the program's output; takes effect when they are imported."""
    warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


class _Bars:
    """One bar a stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if event.stage == NOTE:
            self._bars.console.print(Text(event.note))
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, note="")
        total = event.total or None
        self._bars.update(self._tasks[event.stage], completed=event.done, total=total, note=event.note)


class _Lines:
    """A line a stage, and one every few seconds in between."""

    def __init__(self) -> None:
        self._stage, self._started, self._told = "", 0.0, 0.0

    def __call__(self, event: Event) -> None:
        if event.stage == NOTE:
            sys.stderr.write(f"{event.note}\n")
            return
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._started, self._told = event.stage, now, now
            if not event.total:
                sys.stderr.write(f"{event.stage}\n")
        finished = event.done == event.total
        if not event.total or not (finished or now - self._told >= _LINE_SECONDS):
            return
        self._told = now
        left = (now - self._started) * (event.total - event.done) / max(event.done, 1)
        rest = "" if finished else f", about {left:.0f} s left"
        note = f": {event.note}" if event.note else ""
        sys.stderr.write(f"{event.stage} {event.done}/{event.total}{note}{rest}\n")


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    base, site, files = report.base, report.site, report.files
    yield "base model", str(base["model"]) + (f" at {base['revision']}" if base["revision"] else "")
    yield "fingerprint", f"matrix {base['matrix'][:16]}…, settings {base['config'][:16]}…"
    yield "site", f"{site['module']} ({site['architecture']}, layer {site['layer']}, {site['d']}×{site['d_ff']})"
    yield "edits", f"{report.total}, with {_count(report.keys, 'key')}"
    if report.routing:
        yield "memory", ", ".join(f"{name} {value}" for name, value in report.routing.items())
    for shard in report.shards:
        loss = f", loss {shard.losses[-1]:.4g}" if shard.losses else ""
        yield "shard", f"{shard.file}: {_count(len(shard.edits), 'edit')}, mask of {shard.mask_kind}{loss}"
    for file, tensors in report.tensors.items():
        yield file, ", ".join(f"{name.rpartition('.')[2]} {what}" for name, what in tensors.items())
    yield "files", ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in files.items())
    yield "settings", ", ".join(f"{name} {value}" for name, value in report.settings.items())
    yield "written with", ", ".join(f"{name} {version}" for name, version in report.versions.items())
    if report.plot is not None:
        yield "plot", str(report.plot)


def _scores(number: int, entry: MemoryEntry) -> Table:
    """The quantiles of one memory's scores on both sides of its threshold."""
    about = f"{entry.misses:.1%} of the edits' tokens below, {entry.false_alarms:.2%} of unrelated ones above"
    table = Table(title=f"memory {number}: threshold {entry.threshold:.4g} ({plain(entry.rule)}); {about}")
    for column in ("scores below", "edits", "unrelated text"):
        table.add_column(column, justify="right")
    for share in dict.fromkeys([*entry.edit_scores, *entry.unrelated_scores]):
        sides = entry.edit_scores, entry.unrelated_scores
        table.add_row(f"{float(share):.1%}", *(f"{scores[share]:.3f}" if share in scores else "" for scores in sides))
    return table


def plain(text: str) -> Text:
    """Text of a stranger, with whatever would steer a terminal spelt out."""
    return Text("".join(one if one.isprintable() else repr(one)[1:-1] for one in text))


def _plan(what: str, report: Any) -> Text:
    peak = report.peak_rss_bytes / 1e6
    return Text(f"would write {what} to {report.output}/, taking about {peak:.0f} MB of memory; nothing was written")


def _resident(plan: Plan) -> str:
    """What a planned run would hold, read and compute."""
    weights, work = f"{plan.weights / 2**30:.2f} GiB of weights", f"{plan.flops / 1e12:.1f} TFLOP"
    if not plan.streamed:
        return f"{weights} stay in memory; {work}"
    return (
        f"of {weights} {plan.resident / 2**30:.2f} stay in memory, later {plan.held / 2**30:.2f} more above the edit; "
        f"the others pass through, {plan.layer / 2**30:.2f} at a time and {plan.read / 2**30:.0f} in all; "
        f"{plan.spooled / 2**30:.2f} GiB of disk meanwhile; {work}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _steps(answer: Answer) -> Table:
    table = Table()
    table.add_column("token")
    table.add_column("answered by")
    table.add_column("score", justify="right")
    table.add_column("threshold", justify="right")
    lookup = any(step.edit is not None for step in answer.steps)
    if lookup:
        table.add_column("nearest edit")
    for step in answer.steps:
        who = "main memory" if step.memory is None else f"side memory {step.memory}"
        near = [Text(step.edit or "")] if lookup else []
        table.add_row(Text(repr(step.token)[1:-1]), who, f"{step.score:.3f}", f"{step.threshold:.3f}", *near)
    return table
