"""Shards: edits are written into them, and they are merged. Parse, call one library function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wisecli import cli_draft, cli_memory
from wisecli.config import EditSettings, MergeSettings, resolve
from wisecli.console import Console
from wisecli.console_shards import tell_edit, tell_merge
from wisecli.errors import SettingsError
from wisecli.options import (
    AsJson,
    Budget,
    Config,
    Device,
    DryRun,
    Dtype,
    Force,
    Identity,
    Model,
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
    numbers,
    part_in,
    setting,
    size_in_bytes,
)


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
    yes: cli_draft.Yes = False,
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
    from wisecli.commands.edit import edit as run_edit
    from wisecli.commands.reproduce import reproduce as run_reproduce
    from wisecli.edits.admission import USUAL

    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "executor": executor}
    common["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
    named: dict[str, Any] = {"device": device, "dtype": dtype, "strict": strict}
    if from_text is not None:
        if gate.signed is not None:
            raise SettingsError("--verify-signature is for files of edits; `wise draft` writes one that can be signed")
        edits = cli_draft.draw_for_editing(
            console, model, from_text, edits, common, named, yes=yes, dry_run=dry_run, force=force
        )
        if edits is None:
            return
    if into is not None:
        if model is None or edits is None:
            raise SettingsError("--into needs a MODEL and a file of EDITS, or - for a pipe")
        named |= {"config": config, "reason": reason, "who": who, "gate": gate}
        cli_memory.edit_into(
            console, model, edits, into, flags, follow=watch_file, interval=interval, **common, **named
        )
        return
    common["force"] = force
    named |= {"revision": revision, "target_module": target_module, "only": part_in(only), "gate": gate}
    with console.watching() as watch:
        common |= {"dry_run": dry_run, "watch": watch}
        if reproduce is not None:
            if gate != USUAL:
                raise SettingsError("--reproduce writes what was written once; drop what is asked of new edits")
            report = run_reproduce(reproduce, output, model=model, **common)
        elif model is None or edits is None:
            raise SettingsError("give a MODEL and a file of EDITS, or --reproduce and a manifest")
        else:
            report = run_edit(model, edits, output, settings, **common, **named)
    tell_edit(console, report)
    report.check()


def merge(
    shards: Annotated[
        list[Path] | None, typer.Argument(help="Directories that `wise edit` wrote.", show_default=False)
    ] = None,
    output: Output = Path("memory"),
    into: Annotated[
        Path | None, typer.Option(help="Make them the next release of this memory.", show_default="a memory anew")
    ] = None,
    reason: Reason = "",
    who: Who = None,
    mode: Annotated[
        str | None,
        setting(
            MergeSettings,
            "mode",
            "lookup (keys and residuals), merge (one matrix) or retrieve (a matrix a shard).",
            none="lookup; merge for what the gradient writer wrote, or with --method",
        ),
    ] = None,
    method: Annotated[
        str | None,
        setting(
            MergeSettings, "method", "Of matrices: ties, linear, sign, magnitude, dare, dare-ties, slerp or exact."
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        setting(
            MergeSettings,
            "refit",
            "Around merged matrices, give every key its residual back.",
            "--refit/--no-refit",
            none="refit what the closed form wrote",
        ),
    ] = None,
    density: Annotated[float | None, setting(MergeSettings, "density", "Share of entries kept.")] = None,
    scale: Annotated[float | None, setting(MergeSettings, "scale", "Scale λ of the result.", "--lambda")] = None,
    weights: Annotated[
        str | None, setting(MergeSettings, "weights", "Weights of the shards, comma-separated.", none="1 each")
    ] = None,
    router: Annotated[str | None, setting(MergeSettings, "router", "key or norm.", none="the shards'")] = None,
    routing: Annotated[str | None, setting(MergeSettings, "routing", "token or sequence.", none="the shards'")] = None,
    threshold: Annotated[
        str | None, setting(MergeSettings, "threshold", "false-alarm or minimum.", none="the shards'")
    ] = None,
    false_alarm: Annotated[
        float | None,
        setting(
            MergeSettings,
            "false_alarm",
            "Share of unrelated tokens let through.",
            none="0.0015, where a prompt must name the subject 0.0075",
        ),
    ] = None,
    subjects: Annotated[
        str | None,
        setting(
            MergeSettings,
            "subjects",
            "Where a prompt decides: it opens edits whose subject it names, or any.",
        ),
    ] = None,
    sharpness: Annotated[
        float | None,
        setting(MergeSettings, "sharpness", "Of a lookup: β of a softmax over all keys; 0 takes the nearest."),
    ] = None,
    model: Model = None,
    seed: Seed = None,
    config: Config = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Join shards into a side memory and decide the router's thresholds, without loading the model."""
    console = Console(as_json, quiet)
    given = {**locals(), "weights": numbers(weights)}
    settings = resolve(MergeSettings, given, section="merge", file=config)
    from wisecli.commands.merge import merge as run

    if into is not None:
        cli_memory.merge_into(console, shards or [], into, settings, model=model, reason=reason, who=who)
        return
    if not shards:
        raise SettingsError("give the SHARDS that are to be merged")
    with console.watching() as watch:
        report = run(shards, output, settings, model=model, force=force, dry_run=dry_run, watch=watch)
    tell_merge(console, report)
