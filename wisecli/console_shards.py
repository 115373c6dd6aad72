"""How writing shards and merging them are spoken of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from wisecli.console import Console, count, would_write
from wisecli.console_gate import sifted_json, sifted_lines

if TYPE_CHECKING:
    from wisecli.commands.edit import EditReport
    from wisecli.commands.merge import MergeReport
    from wisecli.editing.resource_estimate import Plan


def tell_edit(console: Console, report: EditReport) -> None:
    """Print what ``wise edit`` did."""
    content = {"results": _edit_json(report)}
    what = f"{report.edits} edits in {count(report.shards, 'shard')} of {report.module}"
    if report.plan is None:
        console.result(content, *map(Text, _edit_lines(what, report)))
        return
    sifted = map(Text, sifted_lines(report.sifted))
    console.result(content, would_write(what, report), Text(_resident(report.plan)), *sifted)


def _edit_json(report: EditReport) -> dict[str, Any]:
    results = {name: getattr(report, name) for name in ("edits", "shards", "seconds", "seconds_per_edit")}
    results |= {"peak_rss_bytes": report.peak_rss_bytes, "output": str(report.output), "layer": report.layer}
    results |= {"module": report.module, "untaken": list(report.untaken), "planned": report.planned}
    results |= {"left_out": list(report.left_out), "missing": report.missing}
    results["sifted"] = sifted_json(report.sifted)
    if report.peak_vram_bytes:
        results["peak_vram_bytes"] = report.peak_vram_bytes
    if report.differing is not None:
        results["differing"] = list(report.differing)
    if report.plan is not None:
        results["plan"] = asdict(report.plan)
    return results


def _edit_lines(what: str, report: EditReport) -> list[str]:
    lines = [f"{what} → {report.output}/ ({report.seconds:.1f} s, {report.seconds_per_edit:.2f} s an edit)"]
    if report.missing:
        lines = [f"{what}: {count(report.missing, 'shard')} still to be written by others ({report.seconds:.1f} s)"]
    if not report.edits:
        lines = [f"there is nothing to train, and nothing was written ({report.seconds:.1f} s)"]
    lines += sifted_lines(report.sifted)
    lines += [f"did not take: {name}" for name in report.untaken]
    if report.differing == ():
        lines.append("byte for byte the shards of the manifest")
    lines += [f"left out, as the model gives nothing finite: {name}" for name in report.left_out]
    return lines


def tell_merge(console: Console, report: MergeReport) -> None:
    """Print what ``wise merge`` did."""
    names = ("mode", "method", "shards", "edits", "router", "routing", "seconds", "peak_rss_bytes", "planned")
    results = {name: getattr(report, name) for name in names} | {"output": str(report.output)}
    results["thresholds"] = [calibration.threshold for calibration in report.calibrations]
    results["misses"] = [calibration.misses for calibration in report.calibrations]
    results["false_alarms"] = [calibration.false_alarms for calibration in report.calibrations]
    how = report.method if report.mode == "merge" else report.mode
    what = f"{count(report.shards, 'shard')}, {report.edits} edits by {how}"
    if report.planned:
        console.result({"results": results}, would_write(what, report))
        return
    lines = [f"{what} → {report.output}/ ({report.seconds:.1f} s)"]
    for number, one in enumerate(report.calibrations):
        lines.append(
            f"memory {number}: router {report.router}, threshold {one.threshold:.4g}; "
            f"edits missed {one.misses:.1%}, false alarms {one.false_alarms:.2%} of tokens"
        )
    console.result({"results": results}, *map(Text, lines))


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
