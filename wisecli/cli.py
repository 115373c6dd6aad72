"""The command line: parse, call one library function, print. Nothing here imports torch before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wisecli import __version__, cli_draft, cli_memory
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings, resolve
from wisecli.console import Console, fail, quiet_libraries
from wisecli.console_checkpoint import tell_answers, tell_export, tell_inspection, tell_verification
from wisecli.console_measure import tell_bench, tell_evaluation, tell_study
from wisecli.console_shards import tell_edit, tell_merge
from wisecli.errors import SettingsError, WiseError
from wisecli.options import (
    AsJson,
    Budget,
    Config,
    Device,
    DryRun,
    Dtype,
    Force,
    Identity,
    Memory,
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
    gates_in,
    numbers,
    part_in,
    setting,
    size_in_bytes,
)

app = typer.Typer(
    name="wise",
    help="Edit what a language model knows, without retraining it and without breaking the rest of what it knows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 (read in main)
) -> None:
    if version:
        typer.echo(f"wise {__version__}")
        raise typer.Exit


@app.command()
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
    from wisecli import pipeline
    from wisecli.gate import USUAL

    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "executor": executor}
    common["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
    named: dict[str, Any] = {"device": device, "dtype": dtype, "strict": strict}
    if from_text is not None:
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
            report = pipeline.reproduce(reproduce, output, model=model, **common)
        elif model is None or edits is None:
            raise SettingsError("give a MODEL and a file of EDITS, or --reproduce and a manifest")
        else:
            report = pipeline.edit(model, edits, output, settings, **common, **named)
    tell_edit(console, report)
    report.check()


@app.command()
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
        float | None, setting(MergeSettings, "false_alarm", "Share of unrelated tokens let through.")
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
    from wisecli.pipeline import merge as run

    if into is not None:
        cli_memory.merge_into(console, shards or [], into, settings, model=model, reason=reason, who=who)
        return
    if not shards:
        raise SettingsError("give the SHARDS that are to be merged")
    with console.watching() as watch:
        report = run(shards, output, settings, model=model, force=force, dry_run=dry_run, watch=watch)
    tell_merge(console, report)


@app.command(name="eval")
def evaluate(
    directory: Annotated[str | None, typer.Argument(help="Exported directory, or base model.")] = None,
    dataset: Annotated[
        str | None,
        setting(EvalSettings, "dataset", "A benchmark or a file.", none="the memory's own edits"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset's file, instead of fetching it.")] = None,
    edits: Annotated[
        int | None, setting(EvalSettings, "edits", "Only the first so many records.", none="those the memory holds")
    ] = None,
    memory: Memory = None,
    model: Model = None,
    batch_size: Annotated[int | None, setting(EvalSettings, "batch_size", "Rows at a time.")] = None,
    chat: Annotated[bool | None, setting(EvalSettings, "chat", "Ask in the chat template.", "--chat/--no-chat")] = None,
    generate: Annotated[
        bool | None, setting(EvalSettings, "generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        setting(
            EvalSettings, "max_new_tokens", "Length of generated answers.", none="the longest target and a little more"
        ),
    ] = None,
    fail_under: Annotated[
        str | None, typer.Option(help="Exit with 1 below these, as reliability=.9,locality=.95.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    config: Config = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure reliability, generalization, locality, portability and generated answers, before and after."""
    console = Console(as_json, quiet)
    gates = gates_in(fail_under)
    settings = resolve(EvalSettings, locals(), section="eval", file=config)
    from wisecli.attached import locate_memory
    from wisecli.pipeline import evaluate as run

    place, base = locate_memory(directory, memory, Path("memory"))
    with console.watching() as watch:
        named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        named["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
        report = run(place, settings, model=model or base, data=data, watch=watch, **named)
    tell_evaluation(console, report)
    report.check(gates)


@app.command()
def export(
    base: Annotated[
        str | None, typer.Argument(help="Base model: a directory or a hub id; where the memory says, if not given.")
    ] = None,
    memory: Annotated[Path, typer.Option("--memory", "--delta", help="Memory directory, or a delta to apply.")] = Path(
        "memory"
    ),
    output: Output = Path("edited"),
    form: Annotated[
        Literal["routed", "merged", "delta"],
        typer.Option(
            "--format",
            help="routed (keeps the router), merged (always on, stock architecture) or delta (the memory alone).",
        ),
    ] = "routed",
    link: Annotated[bool, typer.Option("--link", help="Hard-link the base's weights instead of copying.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Size of a file of weights at most, such as 2GB.", show_default="the base's own files"),
    ] = None,
    metrics: Annotated[Path | None, typer.Option(help="Report of wise eval --json, for the model card.")] = None,
    card: Annotated[bool, typer.Option("--model-card/--no-model-card", help="Write a model card.")] = True,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository on the hub to send it to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    model: Model = None,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an edited checkpoint that loads with transformers alone."""
    console = Console(as_json, quiet)
    from wisecli.pipeline import export as run

    with console.watching() as watch:
        named: dict[str, Any] = {"device": device, "force": force, "dry_run": dry_run, "watch": watch}
        weights: dict[str, Any] = {"link": link, "dtype": dtype}
        weights["file_bytes"] = size_in_bytes(max_shard_size, "--max-shard-size")
        hub: dict[str, Any] = {"push_to": push_to_hub, "private": private, "metrics": metrics, "card": card}
        report = run(memory, output, form, model=base or model, **weights, **hub, **named)
    tell_export(console, report)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts to answer.")],
    memory: Memory = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 32,
    explain: Annotated[bool, typer.Option("--explain", help="Say which memory answered each token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with an edited model."""
    console = Console(as_json, quiet)
    from wisecli.attached import locate_memory
    from wisecli.pipeline import generate as run

    place, base = locate_memory(model, memory, Path("memory"))
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    named["memory_budget"] = size_in_bytes(memory_budget, "--memory-budget")
    with console.watching():
        answers = run(place, prompts, model=base, explain=explain, chat=chat, **lengths, **named)
    tell_answers(console, answers)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    find: Annotated[str | None, typer.Option("--find", help="Only edits with this text in them.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="List so many edits at most.")] = 20,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the router's scores and threshold into this file.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Say what a directory holds, from its manifest and headers; no weights are loaded."""
    from wisecli.pipeline import inspect as run

    tell_inspection(Console(as_json), run(path, find=find, limit=limit, plot=plot, force=force))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Shards, a memory or an exported checkpoint.")],
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every file of a directory against its manifest, and the base model; exit with 1 if any differs."""
    console = Console(as_json, quiet)
    from wisecli.pipeline import verify as run

    with console.watching() as watch:
        report = run(path, model=model, watch=watch)
    tell_verification(console, report)
    report.check()


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, zsre, counterfact or wikibigedit.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to put it.", show_default="the user cache")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fetch the small model to try things on, or benchmark data."""
    console = Console(as_json, quiet)
    from wisecli.fetch import fetch as run

    with console.watching() as watch:
        place = run(name, output, force=force, watch=watch)
    console.result({"results": {"output": str(place)}}, str(place))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Base model: a directory, a hub id or a GGUF file.")],
    output: Output = Path("bench"),
    dataset: Annotated[
        str | None,
        setting(
            BenchSettings, "dataset", "Benchmarks or files, with commas between: one memory for all.", none="--data"
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A dataset's file, instead of fetching it; once for each.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Records to learn from.", show_default="those that are not edited")
    ] = None,
    methods: Annotated[str | None, setting(BenchSettings, "methods", "Methods, with commas between.")] = None,
    study: Annotated[
        str | None,
        setting(
            BenchSettings,
            "study",
            "Studies in the place of methods, with commas between: router, layers, shards, merge, scaling, latency.",
            none="none",
        ),
    ] = None,
    edits: Annotated[str | None, setting(BenchSettings, "counts", "Numbers of edits, with commas between.")] = None,
    layers: Annotated[int | None, setting(BenchSettings, "layers", "How many layers --study layers looks at.")] = None,
    mask_ratios: Annotated[
        str | None, setting(BenchSettings, "mask_ratios", "Mask ratios of --study shards, with commas between.")
    ] = None,
    shard_counts: Annotated[
        str | None, setting(BenchSettings, "shard_counts", "Numbers of shards of --study shards.")
    ] = None,
    edits_per_shard: Annotated[
        int | None,
        setting(
            BenchSettings,
            "edits_per_shard",
            "For the studies merge, scaling and latency.",
            none="100, or a quarter of the edits",
        ),
    ] = None,
    generate: Annotated[
        bool | None, setting(BenchSettings, "generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    batch_size: Annotated[int | None, setting(BenchSettings, "batch_size", "Rows at a time.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    config: Config = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare editing methods, or study WISE itself: edit with the first records of a dataset, and measure."""
    if study and methods:
        raise SettingsError("--study takes the place of --methods; give one of them, and the other in a second run")
    console = Console(as_json, quiet)
    settings = resolve(BenchSettings, {**locals(), "counts": edits}, section="bench", file=config)
    from wisecli import pipeline

    named: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with console.watching() as watch:
        named |= {"data": data or (), "force": force, "watch": watch}
        if settings.study and not methods:
            tell_study(console, pipeline.study(model, output, settings, **named))
        else:
            tell_bench(console, pipeline.bench(model, output, settings, train=train, **named))


for _command in (cli_memory.remove, cli_memory.rollback, cli_memory.log, cli_memory.diff, cli_memory.explain):
    app.command()(_command)
app.command()(cli_draft.draft)


def main() -> None:
    """Run the command line; every error the user can act on ends in one sentence and its exit code."""
    debug = "--debug" in sys.argv[1:2]
    quiet_libraries()
    try:
        app()
    except WiseError as error:
        if debug:
            raise
        fail(str(error), error.details)
        sys.exit(error.exit_code)
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:  # Typer has caught the interruption, and says nothing of it
            fail("interrupted; nothing was written")
        raise
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        fail(f"{type(error).__name__}: {error}; this is a fault in wise, `wise --debug ...` shows where")
        sys.exit(2)


if __name__ == "__main__":
    main()
