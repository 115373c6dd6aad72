"""``wise edit``: its options, and one call."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from wisecli.cli import options as shared
from wisecli.cli.choices import one_of
from wisecli.cli.commands.draft import Yes
from wisecli.cli.commands.edit_run import EditRun
from wisecli.cli.console import Console
from wisecli.cli.ineffective_flags import of_edit, of_writing
from wisecli.cli.parameters import INPUT, INTO, OUTPUT, TRAINED, WHERE, flag, option, setting
from wisecli.cli.setting_options import set_of, settings_in
from wisecli.cli.unknown_settings import unknown_names
from wisecli.commands.edit.run_options import RunOptions
from wisecli.config import EditRunSettings, EditSettings, resolve
from wisecli.retired_settings import with_current_names

_trained = partial(setting, EditSettings, panel=TRAINED)


def edit(
    model: Annotated[str | None, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")] = None,
    edits: Annotated[Path | None, typer.Argument(help="JSONL, JSON or Parquet, any known layout; - is a pipe.")] = None,
    output: shared.Output = Path("shards"),
    into: Annotated[
        Path | None,
        option("Make them the next release of this memory; without it only shards are written.", metavar="DIR"),
    ] = None,
    device: shared.Device = "auto",
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
    from_text: Annotated[
        Path | None,
        option("Draw the edits from this document; accepted ones are written to EDITS.", panel=INPUT, metavar="FILE"),
    ] = None,
    yes: Yes = False,
    on_conflict: shared.OnConflict = None,
    skip_known: shared.SkipKnown = False,
    derive: shared.Derive = False,
    policy: shared.PolicyFile = None,
    verify_signature: shared.Signature = None,
    signer: shared.Signer = None,
    signer_identity: shared.Identity = None,
    reproduce: Annotated[
        Path | None,
        option("Write the shards of this router.json or shards.json once more.", panel=INPUT, metavar="FILE"),
    ] = None,
    config: shared.Config = None,
    seed: shared.Seed = None,
    watch_file: Annotated[
        bool, flag("With --into: edit lines as they are added to EDITS, until interrupted.", "--watch", panel=INTO)
    ] = False,
    reason: shared.Reason = "",
    who: shared.Who = None,
    sign: shared.Sign = None,
    preset: Annotated[
        str | None, _trained("preset", "default, or paper: gradient steps, edit after edit, as published.")
    ] = None,
    layer: Annotated[
        str | None, _trained("layer", "Layer to edit, or auto.", metavar="N", complete=one_of(("auto",)))
    ] = None,
    set_: Annotated[list[str] | None, set_of("edit", TRAINED)] = None,
    dtype: shared.Dtype = "auto",
    memory_budget: shared.Budget = None,
    revision: Annotated[
        str | None, option("Commit, branch or tag of a hub model.", panel=WHERE, metavar="NAME")
    ] = None,
    trust_remote_code: shared.Trust = False,
    force: shared.Force = False,
    strict: Annotated[bool, flag("Exit with 1 if an edit did not take.", "--strict", panel=OUTPUT)] = False,
    quiet: shared.Quiet = False,
    router: shared.Retired = None,
    routing: shared.Retired = None,
) -> None:
    """Write edits into shards: what each adds behind a layer, or changes of its value matrix, and how to route them."""
    by_set, known = settings_in("edit", set_), EditSettings.__dataclass_fields__
    given = {**locals(), **by_set}
    ineffective = of_edit(given)
    flags = {name: of for name, of in with_current_names(given, known).items() if name in known}
    settings = resolve(EditSettings, flags, section="edit", file=config)
    run_settings = resolve(EditRunSettings, given, section="edit", file=config)
    console = Console(as_json, quiet)
    console.warn([*ineffective, *of_writing(given, settings), *unknown_names(config)])
    signed = verify_signature, signer, signer_identity
    admission = shared.admission_of(on_conflict, skip_known, policy, *signed, run_settings.allow_special_tokens, derive)
    key = shared.key_in(sign)

    load = shared.load_options(device, dtype, trust_remote_code, memory_budget, revision)
    # A batch into a memory is not parted.
    part = shared.part_in(run_settings.only if into is None else None)
    options = RunOptions(executor=run_settings.executor, force=force, strict=strict, dry_run=dry_run, only=part)
    run = EditRun(console, model, edits, load, options, admission)
    if from_text is not None:
        drawn = run.drawn_from(from_text, yes=yes)
        if drawn is None:
            return
        run = drawn
    if into is not None:
        every = run_settings.interval if watch_file else None
        run.into(into, flags, config=config, who=who, reason=reason, key=key, every=every)
    elif reproduce is not None:
        run.again(reproduce, output)
    else:
        run.write_shards(output, settings, run_settings.target_module)
