"""What directories hold, and whether they are whole. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli.console import Console, Table, count
from wisecli.cli.options import AsJson, Force, Identity, Model, Quiet, SealSignature, Signer, signed_by
from wisecli.cli.parameters import option

if TYPE_CHECKING:
    from wisecli.artifacts.memory_manifest import MemoryEntry
    from wisecli.commands.checkpoint.inspect import InspectReport
    from wisecli.commands.checkpoint.verify_report import VerifyReport


def inspect(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    find: Annotated[str | None, option("Only edits with this text in them.", "--find")] = None,
    limit: Annotated[int, option("List so many edits at most.", "--limit", default="20", metavar="N", minimum=0)] = 20,
    plot: Annotated[
        Path | None, option("Draw the router's scores and threshold into this file.", "--plot", metavar="FILE")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a directory holds, from its manifest and headers; no weights are loaded."""
    from wisecli.commands.checkpoint.inspect import inspect as run

    tell_inspection(Console(as_json, quiet), run(path, find=find, limit=limit, plot=plot, force=force))


def verify(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    model: Model = None,
    verify_signature: SealSignature = None,
    signer: Signer = None,
    signer_identity: Identity = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every file of a directory against its manifest, and the base model; exit with 1 if any differs."""
    console = Console(as_json, quiet)
    from wisecli.commands.checkpoint.verify import verify as run

    signed = signed_by(verify_signature, signer, signer_identity)
    with console.watching() as on_progress:
        report = run(path, model=model, signed=signed, on_progress=on_progress)
    tell_verification(console, report)
    report.check()


_STATES = {"same": "ok", "differs": "DIFFERS", "unchecked": "not checked"}


def tell_inspection(console: Console, report: InspectReport) -> None:
    """Print what ``wise inspect`` found."""
    facts = Table(("", ""), f"{report.path}: {report.kind}", headed=False)
    for name, value in _facts(report):
        facts.add(name, value)
    more_columns = ("follows from", "by") if report.consequences else ()
    what = f"{count(report.matched, 'edit')}{' and consequences' if more_columns else ''}"
    edits = Table(("id", "prompt", "target", "subject", *more_columns), f"{len(report.edits)} of {what}")
    for edit in report.edits:
        follows = (edit.consequence_of or "", edit.derived or "") if more_columns else ()
        edits.add(edit.id, edit.prompt, edit.target, edit.subject or "", *follows)
    scores = [_scores(number, entry) for number, entry in enumerate(report.memories)]
    none = [f"none of {count(report.total, 'edit')} has that text in it"] if report.total > report.matched == 0 else []
    console.result(report.as_json(), facts, *scores, *([edits] if report.edits else none))


def tell_verification(console: Console, report: VerifyReport) -> None:
    """Print what ``wise verify`` found, a line a check."""
    lines = []
    for check in report.checks:
        what = f"{check.file}: {check.what}" + (f" {check.tensor}" if check.tensor else "")
        sides = f": expected {check.expected}, found {check.found}" if check.state == "differs" else ""
        why = f": {check.found}" if check.state == "unchecked" else ""
        lines.append(f"{_STATES[check.state]:<11} {what}{sides}{why}")
    console.result(report.as_json(), *lines)


def _described(site: Mapping[str, Any]) -> str:
    """Return where edits are: in a matrix, by its path and shape, or behind a layer, by its path and width."""
    if "module" in site:
        return f"{site['module']} ({site['architecture']}, layer {site['layer']}, {site['d']}×{site['d_ff']})"
    return f"behind {site['layer_module']} ({site['architecture']}, layer {site['layer']}, width {site['d']})"


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    """Yield what is known of an artifact, as names and values to print."""
    base, site, files = report.base, report.site, report.files
    yield "base model", str(base["model"]) + (f" at {base['revision']}" if base["revision"] else "")
    yield "fingerprint", f"matrix {base['matrix'][:16]}…, settings {base['config'][:16]}…"
    yield "site", _described(site)
    followed = f" and {count(report.consequences, 'consequence')}" if report.consequences else ""
    yield "edits", f"{report.total - report.consequences}{followed}, with {count(report.keys, 'key')}"
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
    """Return the quantiles of one memory's scores on both sides of its threshold."""
    about = f"{entry.misses:.1%} of the edits' scores below"
    about += "" if entry.false_alarms is None else f", {entry.false_alarms:.2%} of unrelated ones above"
    about += "" if entry.mentioned is None else f", {entry.mentioned:.0%} of mentions of made-up facts open them"
    columns = "scores below", "edits", "unrelated text"
    table = Table(columns, f"memory {number}: threshold {entry.threshold:.4g} ({entry.rule}); {about}", columns)
    for share in dict.fromkeys([*entry.edit_scores, *entry.unrelated_scores]):
        sides = entry.edit_scores, entry.unrelated_scores
        table.add(f"{float(share):.1%}", *(f"{scores[share]:.3f}" if share in scores else "" for scores in sides))
    return table
