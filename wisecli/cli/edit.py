"""``wise edit``: its options, and one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from wisecli.cli.choices import EXECUTORS, one_of
from wisecli.cli.console import Console
from wisecli.cli.draft import Yes
from wisecli.cli.edit_run import EditRun
from wisecli.cli.effects import of_edit
from wisecli.cli.options import (
    AllowSpecial,
    AsJson,
    Budget,
    Config,
    Derive,
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
    Retired,
    Seed,
    Sign,
    Signature,
    Signer,
    SkipKnown,
    Trust,
    Who,
    admission_of,
    key_in,
    load_options,
    part_in,
)
from wisecli.cli.overlooked import overlooked
from wisecli.cli.parameters import INPUT, INTO, OUTPUT, PROMPTS, TRAINED, WHERE, flag, option, setting
from wisecli.commands.run_options import RunOptions
from wisecli.config import EditSettings, resolve
from wisecli.retired_settings import of_today

_trained = partial(setting, EditSettings, panel=TRAINED)
_worded = partial(setting, EditSettings, panel=PROMPTS)


def edit(
    model: Annotated[str | None, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")] = None,
    edits: Annotated[Path | None, typer.Argument(help="JSONL, JSON or Parquet, any known layout; - is a pipe.")] = None,
    output: Output = Path("shards"),
    into: Annotated[
        Path | None,
        option("Make them the next release of this memory; without it only shards are written.", metavar="DIR"),
    ] = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    from_text: Annotated[
        Path | None,
        option("Draw the edits from this document; accepted ones are written to EDITS.", panel=INPUT, metavar="FILE"),
    ] = None,
    yes: Yes = False,
    on_conflict: OnConflict = None,
    skip_known: SkipKnown = False,
    allow_special_tokens: AllowSpecial = False,
    derive: Derive = False,
    policy: PolicyFile = None,
    verify_signature: Signature = None,
    signer: Signer = None,
    signer_identity: Identity = None,
    reproduce: Annotated[
        Path | None,
        option("Write the shards of this router.json or shards.json once more.", panel=INPUT, metavar="FILE"),
    ] = None,
    config: Config = None,
    seed: Seed = None,
    watch_file: Annotated[
        bool,
        flag("With --into: edit lines as they are added to EDITS, until interrupted.", "--watch", panel=INTO),
    ] = False,
    interval: Annotated[
        float,
        option("Seconds between two looks.", panel=INTO, default="1.0", metavar="X", least=0.01),
    ] = 1.0,
    reason: Reason = "",
    who: Who = None,
    sign: Sign = None,
    preset: Annotated[
        str | None, _trained("preset", "default, or paper: gradient steps, edit after edit, as published.")
    ] = None,
    writer: Annotated[str | None, _trained("writer", "solve (closed form) or gradient (the paper's).")] = None,
    schedule: Annotated[str | None, _trained("schedule", "Of the gradient writer: batched or sequential.")] = None,
    layer: Annotated[
        str | None, _trained("layer", "Layer to edit, or auto.", metavar="N", complete=one_of(("auto",)))
    ] = None,
    target_module: Annotated[
        str | None,
        option(
            "Path of the value matrix, with {layer} for the index.",
            panel=TRAINED,
            default="the architecture's",
            metavar="PATH",
        ),
    ] = None,
    shards: Annotated[
        int | None, _trained("shards", "Number of shards.", none="as many as --edits-per-shard needs")
    ] = None,
    edits_per_shard: Annotated[int | None, _trained("edits_per_shard", "Edits a shard at most.")] = None,
    mask_ratio: Annotated[float | None, _trained("mask_ratio", "Density ρ of the masks.")] = None,
    mask_kind: Annotated[str | None, _trained("mask_kind", "columns or elements.")] = None,
    masks: Annotated[
        str | None, _trained("masks", "random (those of two shards overlap) or disjoint (they do not).")
    ] = None,
    passes: Annotated[int | None, _trained("passes", "Passes over a shard at most.")] = None,
    learning_rate: Annotated[float | None, _trained("learning_rate", "Step size while training.")] = None,
    batch_size: Annotated[int | None, _trained("batch_size", "Rows in one step's batch.")] = None,
    contexts: Annotated[int | None, _worded("contexts", "Context prefixes an edit.")] = None,
    in_forms: Annotated[
        bool | None,
        _worded(
            "in_forms",
            "Write edits in the forms that people ask in, or as they are and behind context prefixes.",
            "--forms/--no-forms",
            none="true; false with --writer gradient",
        ),
    ] = None,
    chat: Annotated[bool | None, _worded("chat", "Use the chat template too.", "--chat/--no-chat")] = None,
    augment: Annotated[
        int | None, _worded("augment", "Paraphrases that the model writes for an edit, at most.")
    ] = None,
    executor: Annotated[
        str,
        option(
            "Where shards are written: local, ray or ray://HOST:PORT.",
            panel=WHERE,
            default="local",
            metavar="NAME",
            complete=one_of(EXECUTORS),
        ),
    ] = "local",
    only: Annotated[
        str | None,
        option("Write the k-th of n parts of the shards, such as 3/8.", panel=WHERE, default="all", metavar="K/N"),
    ] = None,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    revision: Annotated[
        str | None, option("Commit, branch or tag of a hub model.", panel=WHERE, metavar="NAME")
    ] = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    strict: Annotated[bool, flag("Exit with 1 if an edit did not take.", "--strict", panel=OUTPUT)] = False,
    quiet: Quiet = False,
    router: Retired = None,
    routing: Retired = None,
) -> None:
    """Write edits into shards: deltas of one value matrix, with the evidence to merge and route them."""
    given, known = locals(), EditSettings.__dataclass_fields__
    unread = of_edit(given)
    flags = {name: of for name, of in of_today(given, known).items() if name in known}
    settings = resolve(EditSettings, flags, section="edit", file=config)
    console = Console(as_json, quiet)
    console.warn([*unread, *overlooked(config)])
    signed = verify_signature, signer, signer_identity
    admission = admission_of(on_conflict, skip_known, policy, *signed, allow_special_tokens, derive)
    key = key_in(sign)

    load = load_options(device, dtype, trust_remote_code, memory_budget, revision)
    # A batch into a memory is not parted.
    part = part_in(only if into is None else None)
    options = RunOptions(executor=executor, force=force, strict=strict, dry_run=dry_run, only=part)
    run = EditRun(console, model, edits, load, options, admission)
    if from_text is not None:
        drawn = run.drawn_from(from_text, yes=yes)
        if drawn is None:
            return
        run = drawn
    if into is not None:
        every = interval if watch_file else None
        run.into(into, flags, config=config, who=who, reason=reason, key=key, every=every)
    elif reproduce is not None:
        run.again(reproduce, output)
    else:
        run.write_shards(output, settings, target_module)
