"""``wise edit``: options, one call, what is printed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from wisecli.cli.console import Console, count, sifted_json, sifted_lines, would_write
from wisecli.cli.draft import Yes, draw_for_editing
from wisecli.cli.edit_into import IntoMemory
from wisecli.cli.options import (
    AsJson,
    Budget,
    Config,
    Device,
    DryRun,
    Dtype,
    Force,
    Identity,
    OnConflict,
    Output,
    PolicyFile,
    Quiet,
    Reason,
    Seed,
    Signature,
    Signer,
    SkipKnown,
    Trust,
    Who,
    gate_of,
    load_options,
    part_in,
    setting,
)
from wisecli.config import EditSettings, resolve
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.commands.edit import EditReport
    from wisecli.editing.resource_estimate import Plan


def edit(
    model: Annotated[str | None, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")] = None,
    edits: Annotated[
        Path | None, typer.Argument(help="Edits: JSONL, JSON or Parquet, in any known layout; - reads a pipe.")
    ] = None,
    output: Output = Path("shards"),
    into: Annotated[
        Path | None, typer.Option(help="Make them the next release of this memory.", show_default="shards alone")
    ] = None,
    watch_file: Annotated[
        bool, typer.Option("--watch", help="With --into: edit lines as they are added to EDITS, until interrupted.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.01, help="With --watch: seconds between two looks.")] = 1.0,
    from_text: Annotated[
        Path | None, typer.Option(help="Draw the edits from this document; accepted ones are written to EDITS.")
    ] = None,
    yes: Yes = False,
    reason: Reason = "",
    who: Who = None,
    on_conflict: OnConflict = None,
    skip_known: SkipKnown = False,
    policy: PolicyFile = None,
    verify_signature: Signature = None,
    signer: Signer = None,
    signer_identity: Identity = None,
    preset: Annotated[
        str | None, setting(EditSettings, "preset", "default, or paper (sequential, as published).")
    ] = None,
    writer: Annotated[
        str | None, setting(EditSettings, "writer", "solve (closed form) or gradient (the paper's).")
    ] = None,
    schedule: Annotated[
        str | None, setting(EditSettings, "schedule", "Of the gradient writer: batched or sequential.")
    ] = None,
    layer: Annotated[str | None, setting(EditSettings, "layer", "Layer to edit, or auto.")] = None,
    shards: Annotated[
        int | None, setting(EditSettings, "shards", "Number of shards.", none="as many as --edits-per-shard needs")
    ] = None,
    edits_per_shard: Annotated[int | None, setting(EditSettings, "edits_per_shard", "Edits a shard at most.")] = None,
    mask_ratio: Annotated[float | None, setting(EditSettings, "mask_ratio", "Density ρ of the masks.")] = None,
    mask_kind: Annotated[str | None, setting(EditSettings, "mask_kind", "columns or elements.")] = None,
    masks: Annotated[
        str | None, setting(EditSettings, "masks", "random (masks of shards overlap) or disjoint.")
    ] = None,
    passes: Annotated[int | None, setting(EditSettings, "passes", "Passes over a shard at most.")] = None,
    learning_rate: Annotated[float | None, setting(EditSettings, "learning_rate", "Step size.")] = None,
    batch_size: Annotated[int | None, setting(EditSettings, "batch_size", "Rows a step.")] = None,
    contexts: Annotated[int | None, setting(EditSettings, "contexts", "Context prefixes an edit.")] = None,
    chat: Annotated[
        bool | None, setting(EditSettings, "chat", "Edit the prompts in the chat template, too.", "--chat/--no-chat")
    ] = None,
    augment: Annotated[
        int | None, setting(EditSettings, "augment", "Paraphrases that the model writes for an edit, at most.")
    ] = None,
    router: Annotated[
        str | None, setting(EditSettings, "router", "key (nearest whitened key) or norm (the paper's).")
    ] = None,
    routing: Annotated[str | None, setting(EditSettings, "routing", "One decision a token or a sequence.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    target_module: Annotated[
        str | None,
        typer.Option(help="Path of the value matrix, with {layer} for the index.", show_default="the architecture's"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if an edit did not take.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Write the k-th of n parts of the shards, as 3/8.", show_default="all")
    ] = None,
    executor: Annotated[str, typer.Option(help="Where shards are written: local, ray or ray://HOST:PORT.")] = "local",
    reproduce: Annotated[
        Path | None, typer.Option(help="Write the shards of this router.json or shards.json once more.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    seed: Seed = None,
    config: Config = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write edits into shards: deltas of one value matrix, with the evidence to merge and route them."""
    console = Console(as_json, quiet)
    flags = {name: value for name, value in locals().items() if name in EditSettings.__dataclass_fields__}
    settings = resolve(EditSettings, flags, section="edit", file=config)
    gate = gate_of(on_conflict, skip_known, policy, verify_signature, signer, signer_identity)
    from wisecli.commands.edit import RunOptions
    from wisecli.commands.edit import edit as run_edit
    from wisecli.commands.reproduce import reproduce as run_reproduce
    from wisecli.edits.admission import USUAL
    from wisecli.memory.history import Provenance

    load = load_options(device, dtype, trust_remote_code, memory_budget, revision)
    options = RunOptions(executor=executor, force=force, strict=strict, dry_run=dry_run)
    if from_text is not None:
        if gate.signed is not None:
            raise SettingsError("--verify-signature is for files of edits; `wise draft` writes one that can be signed")
        edits = draw_for_editing(console, model, from_text, edits, load=load, yes=yes, dry_run=dry_run, force=force)
        if edits is None:
            return
    if into is not None:
        if model is None or edits is None:
            raise SettingsError("--into needs a MODEL and a file of EDITS, or - for a pipe")
        into_memory = IntoMemory(
            console, model, edits, into, flags, config, Provenance(who, reason), load, options, gate
        )
        if watch_file:
            into_memory.follow(interval)
        else:
            into_memory.once()
        return
    options = replace(options, only=part_in(only))
    with console.watching() as watch:
        if reproduce is not None:
            if gate != USUAL:
                raise SettingsError("--reproduce writes what was written once; drop what is asked of new edits")
            report = run_reproduce(reproduce, output, model=model, load=load, options=options, watch=watch)
        elif model is None or edits is None:
            raise SettingsError("give a MODEL and a file of EDITS, or --reproduce and a manifest")
        else:
            report = run_edit(
                model,
                edits,
                output,
                settings,
                load=load,
                target_module=target_module,
                options=options,
                gate=gate,
                watch=watch,
            )
    tell_edit(console, report)
    report.check()


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
