"""How exported checkpoints, what they answer and what directories hold are spoken of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from wisecli.console import Console, count, plain, would_write

if TYPE_CHECKING:
    from wisecli.artifacts.memory_manifest import MemoryEntry
    from wisecli.commands.export import ExportReport
    from wisecli.commands.generate import Answer
    from wisecli.commands.inspect import InspectReport
    from wisecli.commands.verify import VerifyReport

_STATES = {"same": "ok", "differs": "DIFFERS", "unchecked": "not checked"}


def tell_export(console: Console, report: ExportReport) -> None:
    """Print what ``wise export`` wrote."""
    names = ("format", "edits", "bytes", "seconds", "peak_rss_bytes", "locality", "tokens", "pushed", "planned")
    results = {name: getattr(report, name) for name in names} | {"output": str(report.output)}
    what = f"{report.format} {'' if report.format == 'delta' else 'checkpoint '}with {report.edits} edits"
    if report.planned:
        console.result({"results": results}, would_write(what, report))
        return
    lines = [f"{what} → {report.output}/ ({report.bytes / 1e6:.0f} MB, {report.seconds:.1f} s)"]
    if report.locality is not None:
        kept = f"{report.locality:.1%} of {report.tokens} next tokens of unrelated text stay the base model's"
        lines.append(f"always on: {kept}; --format routed leaves unrelated text alone")
    if report.pushed is not None:
        lines.append(f"sent to {report.pushed}")
    console.result({"results": results}, *map(Text, lines))


def tell_answers(console: Console, answers: Sequence[Answer]) -> None:
    """Print answers, with a table of tokens where they were explained."""
    shown: list[Any] = []
    for answer in answers:
        shown.append(Text(answer.text) if len(answers) == 1 else Text(f"{answer.prompt} → {answer.text}"))
        if answer.steps:
            shown.append(_steps(answer))
    content = [{"prompt": a.prompt, "answer": a.text, "steps": [vars(step) for step in a.steps]} for a in answers]
    console.result({"results": content}, *shown)


def tell_inspection(console: Console, report: InspectReport) -> None:
    """Print what ``wise inspect`` found."""
    facts = Table(show_header=False, title=plain(f"{report.path}: {report.kind}"))
    for name, value in _facts(report):
        facts.add_row(name, plain(value))
    edits = Table(title=f"{len(report.edits)} of {count(report.matched, 'edit')}")
    for column in ("id", "prompt", "target", "subject"):
        edits.add_column(column)
    for edit in report.edits:
        edits.add_row(*map(plain, (edit.id, edit.prompt, edit.target, edit.subject or "")))
    scores = [_scores(number, entry) for number, entry in enumerate(report.memories)]
    console.result(report.as_json(), facts, *scores, *([edits] if report.edits else []))


def tell_verification(console: Console, report: VerifyReport) -> None:
    """Print what ``wise verify`` found, a line a check."""
    lines = []
    for check in report.checks:
        what = f"{check.file}: {check.what}" + (f" {check.tensor}" if check.tensor else "")
        sides = f": expected {check.expected}, found {check.found}" if check.state == "differs" else ""
        why = f": {check.found}" if check.state == "unchecked" else ""
        lines.append(plain(f"{_STATES[check.state]:<11} {what}{sides}{why}"))
    console.result(report.as_json(), *lines)


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


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    base, site, files = report.base, report.site, report.files
    yield "base model", str(base["model"]) + (f" at {base['revision']}" if base["revision"] else "")
    yield "fingerprint", f"matrix {base['matrix'][:16]}…, settings {base['config'][:16]}…"
    yield "site", f"{site['module']} ({site['architecture']}, layer {site['layer']}, {site['d']}×{site['d_ff']})"
    yield "edits", f"{report.total}, with {count(report.keys, 'key')}"
    if report.routing:
        yield "memory", ", ".join(f"{name} {value}" for name, value in report.routing.items())
    for shard in report.shards:
        loss = f", loss {shard.losses[-1]:.4g}" if shard.losses else ""
        yield "shard", f"{shard.file}: {count(len(shard.edits), 'edit')}, mask of {shard.mask_kind}{loss}"
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
