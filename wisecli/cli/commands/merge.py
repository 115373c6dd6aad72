"""``wise merge``: options, one call, what is printed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import options as shared
from wisecli.cli.choices import MERGE_METHODS, one_of
from wisecli.cli.commands.memory import ReportPrinter
from wisecli.cli.console import Console, count, would_write
from wisecli.cli.ineffective_flags import of_merge
from wisecli.cli.parameters import INTO, MERGED, flag, option, setting
from wisecli.cli.setting_options import set_of, settings_in
from wisecli.cli.unknown_settings import unknown_names
from wisecli.commands.outputs import memory_output
from wisecli.config import MergeSettings, resolve
from wisecli.edits.text import edits_with
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.memory.merge import MergeReport
    from wisecli.memory.history.release_log import Provenance


_merged = partial(setting, MergeSettings, panel=MERGED)
# What the JSON says of every memory's router, and its name in the calibration.
_CALIBRATED = {"thresholds": "threshold", "misses": "misses", "false_alarms": "false_alarms", "mentioned": "mentioned"}


def merge(
    shards: Annotated[
        list[Path] | None, typer.Argument(help="Directories that `wise edit` wrote.", show_default=False)
    ] = None,
    output: shared.Output = Path("memory"),
    into: Annotated[
        Path | None, option("Make them the next release of this memory.", default="a memory anew", metavar="DIR")
    ] = None,
    mode: Annotated[
        str | None,
        setting(
            MergeSettings,
            "mode",
            "lookup (keys and residuals), merge (one matrix) or retrieve (a matrix a shard).",
            none="what the shards were written for; merge with --method",
        ),
    ] = None,
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
    model: shared.Model = None,
    config: shared.Config = None,
    seed: shared.Seed = None,
    reason: shared.Reason = "",
    who: shared.Who = None,
    sign: shared.Sign = None,
    history: Annotated[
        bool,
        flag(
            "Keep the shards in the memory, so that it can be changed and looked back on.",
            "--history/--no-history",
            panel=INTO,
            default="history",
        ),
    ] = True,
    method: Annotated[
        str | None,
        _merged(
            "method",
            "Of matrices: ties, linear, sign, magnitude, dare, dare-ties, slerp or exact.",
            complete=one_of(MERGE_METHODS),
        ),
    ] = None,
    density: Annotated[float | None, _merged("density", "Share of entries kept.")] = None,
    weights: Annotated[
        str | None, _merged("weights", "Weights of the shards, comma-separated.", none="1 each", metavar="X,…")
    ] = None,
    set_: Annotated[list[str] | None, set_of("merge", MERGED)] = None,
    force: shared.Force = False,
    quiet: shared.Quiet = False,
    router: shared.Retired = None,
    routing: shared.Retired = None,
    sharpness: shared.Retired = None,
) -> None:
    """Join shards into a side memory and decide the router's thresholds, without loading the model."""
    by_set = settings_in("merge", set_)
    given = {**locals(), "weights": shared.numbers(weights), **by_set}
    console, ineffective = Console(as_json, quiet), of_merge(given)
    settings = resolve(MergeSettings, given, section="merge", file=config)
    console.warn([*ineffective, *unknown_names(config)])
    key = shared.key_in(sign)
    if into is not None:
        provenance = shared.provenance_of(who, reason, key)
        merge_into(console, shards or [], into, settings, model=model, provenance=provenance)
        return
    if not shards:
        raise SettingsError("give the SHARDS that are to be merged")
    memory_output(output, shards, force=force).require_unless_kept()
    from wisecli.commands.memory.merge import merge as run

    with console.watching() as on_progress:
        report = run(
            shards,
            output,
            settings,
            model=model,
            history=history,
            provenance=shared.provenance_of(who, reason, key),
            force=force,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    tell_merge(console, report)


def merge_into(
    console: Console,
    shards: list[Path],
    memory: Path,
    settings: MergeSettings,
    *,
    model: str | None,
    provenance: Provenance,
) -> None:
    """Merge shards into a memory, and print what came of it."""
    from wisecli.commands.memory.merge_into import merge_into as run

    with console.watching() as on_progress:
        published = run(shards, memory, settings, model=model, provenance=provenance, on_progress=on_progress)
    ReportPrinter(console).joined(str(memory), published)


def tell_merge(console: Console, report: MergeReport) -> None:
    """Print what ``wise merge`` did."""
    names = "mode method shards edits consequences seconds peak_rss_bytes planned up_to_date"
    results = {name: getattr(report, name) for name in names.split()} | {"output": str(report.output)}
    for plural, name in _CALIBRATED.items():
        results[plural] = [getattr(calibration, name) for calibration in report.calibrations]
    how = report.method if report.mode == "merge" else report.mode
    what = f"{count(report.shards, 'shard')}, {edits_with(report.edits, report.consequences)} by {how}"
    if report.planned:
        console.result({"results": results}, would_write(what, report))
        return
    done = ": up to date, nothing was written" if report.up_to_date else ""
    lines = [f"{what} → {report.output}/{done} ({report.seconds:.1f} s)"]
    if report.held is not None:
        results |= {"held": report.held, "gone": list(report.gone)}
        lines.append(f"it was changed since, and holds {count(report.held, 'edit')} now")
        lines += [f"no longer in it, as it was replaced or removed: {name}" for name in report.gone]
    called = "unrelated prompts by their meaning alone" if report.by_facts else "tokens"
    for number, found in enumerate(report.calibrations):
        alarms = "not known" if found.false_alarms is None else f"{found.false_alarms:.2%} of {called}"
        lines.append(
            f"memory {number}: threshold {found.threshold:.4g}; edits missed {found.misses:.1%}, false alarms {alarms}"
        )
        if found.mentioned is not None:
            lines.append(f"of prompts that mention a made-up fact and don't ask it, {found.mentioned:.0%} open it")
    console.result({"results": results}, *lines)
