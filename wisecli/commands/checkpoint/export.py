"""``wise export``: base model + memory → a checkpoint that others load."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.commands.checkpoint.export_source import ExportSource, read_source
from wisecli.commands.outputs import checkpoint_output
from wisecli.config import LoadOptions
from wisecli.edits.checks.signatures import Signed, SigningKey
from wisecli.edits.record import consequences_in
from wisecli.environment import peak_rss_bytes
from wisecli.errors import ModelError, SettingsError, reason_of
from wisecli.export.export_record import export_record, require_no_memory, up_to_date_export
from wisecli.export.gguf.gguf_file import Quantization
from wisecli.export.model_card import CARD_NAME, model_card, read_figures
from wisecli.export.routed.checkpoint import seal_export, write_delta, write_merged, write_routed
from wisecli.export.weights import Link, Packing
from wisecli.io.atomic_output import require_space, tidy, whole_directory
from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.io.overwrite_policy import Output
from wisecli.models.layout.architectures import quantisation_of
from wisecli.models.layout.matrix_site import as_matrix
from wisecli.models.loading import is_exported, pick_dtype
from wisecli.progress import Event, ProgressCallback, ignore_progress

Format = Literal["routed", "stock", "gguf", "merged", "delta"]
# Forms in which the memory is decoder blocks.
_AS_BLOCKS = ("stock", "gguf")
# What may be measured of a form, as reports and records have it.
_Figures = dict[str, Any]
_UNMEASURED: _Figures = {"locality": None, "tokens": 0, "gate": None}


@dataclass(frozen=True)
class WeightFiles:
    """How the base's weights are written.

    ``link`` hard-links its files instead of copying them, with ``auto`` those that can be. ``dtype`` is a type's name;
    ``auto`` leaves them as they are. ``file_bytes`` is the most that a file may take; the base's own files by default.
    ``quantize`` is how those of one GGUF file are stored.
    """

    link: Link = False
    dtype: str = "auto"
    file_bytes: int | None = None
    quantize: Quantization = "q8_0"


@dataclass(frozen=True)
class Publication:
    """What goes with the weights, and where to.

    ``card`` says whether a model card is written, with the figures of ``metrics``, a report of ``wise eval --json``.
    ``push_to`` is the repository on the hub that the directory is sent to, made ``private`` if it is new. ``key`` signs
    the digests of all files.
    """

    card: bool = True
    metrics: Path | None = None
    push_to: str | None = None
    private: bool = False
    key: SigningKey | None = None


@dataclass(frozen=True)
class ExportReport:
    """What ``wise export`` wrote: ``edits`` and, counted apart, ``consequences`` that follow from them.

    ``locality`` is measured for merged checkpoints: the share of unrelated tokens after which the next token's arg-max
    stays the base model's; ``tokens`` is how many were looked at. Routed checkpoints cost what ``wise eval`` says.
    ``gate`` is what was measured of a memory that became neurons.
    ``pushed`` is where on the hub it went. ``up_to_date`` says that the export was there already.
    """

    output: Path
    format: str
    edits: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    locality: float | None = None
    tokens: int = 0
    pushed: str | None = None
    planned: bool = False
    up_to_date: bool = False
    consequences: int = 0
    gate: dict[str, Any] | None = None


def export(
    memory: Path,
    output: Path,
    form: Format = "routed",
    *,
    model: str | None = None,
    load: LoadOptions = LoadOptions(),
    weights: WeightFiles = WeightFiles(),
    publication: Publication = Publication(),
    signed: Signed | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> ExportReport:
    """Write an edited checkpoint.

    Of the one that is there already, of the same memory and base by the same settings, nothing is written anew.

    Args:
        memory: a memory, or what ``delta`` wrote.
        form: ``routed`` keeps the router (custom code in the checkpoint); ``stock`` writes both as decoder
            blocks of a stock architecture, and ``gguf`` a file of llama.cpp's of that; ``merged`` always applies
            the memory (stock architecture, and unrelated text changes); ``delta`` is the memory alone.
        load: how the base model is loaded where its answers are compared, or a router is fitted.
        signed: the signature that the memory must have.
        verify: whether a stock checkpoint is asked all its edits, and unrelated texts, once it is written.

    Raises:
        SignatureError: the memory was not signed as it must be.
        WiseError: the memory, the base model or the disk cannot be used (nothing is left behind), or the hub cannot be
            reached (what was written stays).
    """
    started, packing = time.perf_counter(), _packing(weights, form)
    target = checkpoint_output(output, memory, model, publication.metrics, force=force)
    target.require_unless_kept()
    there = target.is_kept
    if not there:
        require_no_memory(output)
    figures = None if publication.metrics is None else read_figures(publication.metrics)
    base, manifest, digest = read_source(memory, model, signed)
    if not there:
        Output(output, (), (base,)).require_apart()
    if is_exported(base):
        raise ModelError(f"{base} is an exported checkpoint already; pass the base model with --model")
    checkpoint = Checkpoint(base)
    _require_form(base, manifest, packing, form)
    record = _record(digest, checkpoint, form, weights, publication, figures, verify=verify)
    if there and not dry_run:
        tidy(output)
    if there and (kept := up_to_date_export(output, record, signed=publication.key is not None)):
        pushed = None if dry_run else _push(output, publication, on_progress)
        measured = {name: kept.get(name) for name in _UNMEASURED}
        return _report(output, form, manifest, _size(output), started, pushed=pushed, up_to_date=True, **measured)
    planned = _planned_bytes(output, manifest, checkpoint, form, weights)
    if dry_run:
        return _report(output, form, manifest, planned, started, planned=True)
    with whole_directory(output, force=force) as working:
        on_progress(Event("writing"))
        quantize = weights.quantize if form == "gguf" else None
        given = ExportSource(base, checkpoint, manifest, packing, quantize, load, verify)
        measured, note = _write(working, form, given, on_progress)
        if publication.card:
            text = model_card(manifest, form, base=base, figures=figures, note=note)
            (working / CARD_NAME).write_text(text, encoding="utf-8")
        seal_export(working, {**record, **measured}, publication.key)
    pushed = _push(output, publication, on_progress)
    return _report(output, form, manifest, _size(output), started, pushed=pushed, **measured)


def _report(output: Path, form: Format, manifest: Manifest, size: int, started: float, **measured: Any) -> ExportReport:
    """Return the report on an export of ``size`` bytes that began at ``started``."""
    followed = len(consequences_in(manifest.edits))
    edits, seconds = len(manifest.edits) - followed, time.perf_counter() - started
    return ExportReport(output, form, edits, size, seconds, peak_rss_bytes(), consequences=followed, **measured)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _planned_bytes(output: Path, manifest: Manifest, checkpoint: Checkpoint, form: Format, weights: WeightFiles) -> int:
    """Return how many bytes an export will have, as far as is known.

    Raises:
        WiseError: the disk has no room for them.
    """
    side = sum(tensor.nbytes for tensor in manifest.memory.tensors.values())
    size = 0 if form == "delta" else sum(path.stat().st_size for path in checkpoint.files)
    require_space(output, side + (size if not weights.link or not _on_one_disk(checkpoint, output) else 0))
    return size + side


def _require_form(base: Path, manifest: Manifest, packing: Packing, form: Format) -> None:
    """Check that a base with such edits can be written in a form."""
    if packing.dtype is not None and quantisation_of(read_json(base / "config.json")) is not None:
        raise ModelError(f"{base} is quantised: its weights are written as they are stored, so leave out --dtype")
    if form == "merged":
        as_matrix(manifest.site)
    if form in _AS_BLOCKS:
        from wisecli.export.gguf.gguf_file import require_gguf
        from wisecli.export.stock.stock_checkpoint import require_stock

        require_stock(base, manifest.site)
        if form == "gguf":
            require_gguf(base)


def _write(working: Path, form: Format, given: ExportSource, on_progress: ProgressCallback) -> tuple[_Figures, str]:
    """Write one form into an empty directory; return what was measured of it, and a paragraph on that."""
    base, checkpoint, manifest, packing = given.base, given.checkpoint, given.manifest, given.packing
    if form == "routed":
        write_routed(working, base, checkpoint, manifest, packing)
    elif form == "delta":
        write_delta(working, checkpoint, manifest)
    # What runs the model takes seconds to import, which the other forms need not wait.
    elif form == "merged":
        from wisecli.commands.checkpoint.export_merged import merged_locality

        locality, tokens = merged_locality(base, manifest, load=given.load, on_progress=on_progress)
        note = f"\nAlways on: {locality:.1%} of {tokens} next tokens of unrelated text stay the base model's.\n"
        write_merged(working, base, checkpoint, manifest, packing)
        return {**_UNMEASURED, "locality": locality, "tokens": tokens}, note
    else:
        from wisecli.commands.checkpoint.export_stock import write_as_blocks
        from wisecli.export.stock.stock_answers import router_lines

        gate = write_as_blocks(working, given, on_progress)
        return {**_UNMEASURED, "gate": gate}, f"\n{'; '.join(router_lines(gate))}.\n"
    return _UNMEASURED, ""


def _record(
    memory: str,
    checkpoint: Checkpoint,
    form: Format,
    weights: WeightFiles,
    publication: Publication,
    figures: object,
    *,
    verify: bool,
) -> dict[str, Any]:
    """Return the record of how a checkpoint is written, by which a later run sees whether it is up to date."""
    settings = {
        "format": form,
        "link": weights.link,
        "dtype": weights.dtype,
        "max_shard_size": weights.file_bytes,
        **({"quantize": weights.quantize} if form == "gguf" else {}),
        **({"verify": False} if form in _AS_BLOCKS and not verify else {}),
        "model_card": publication.card,
    }
    return export_record(memory, checkpoint, settings, figures if publication.card else None)


def _on_one_disk(checkpoint: Checkpoint, output: Path) -> bool:
    """Return whether files of a checkpoint may be linked where an output will be, on the same disk."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return all(path.stat().st_dev == parent.stat().st_dev for path in checkpoint.files)


def _packing(weights: WeightFiles, form: Format) -> Packing:
    """Return how the weights' files are written."""
    if weights.link and form in _AS_BLOCKS:
        raise SettingsError(
            f"--link keeps the base's files as they are, and --format {form} moves layers; leave it out"
        )
    chosen = pick_dtype(weights.dtype)
    packing = Packing(weights.link, chosen if isinstance(chosen, torch.dtype) else None, weights.file_bytes)
    if weights.link and not packing.as_stored:
        raise SettingsError("--link keeps the base's files as they are; leave it out with --dtype or --max-shard-size")
    return packing


def _push(output: Path, publication: Publication, on_progress: ProgressCallback) -> str | None:
    """Send a directory to the hub, if it is to be sent; return where it is there.

    Raises:
        ModelError: the hub does not take it.
    """
    repository = publication.push_to
    if repository is None:
        return None
    from huggingface_hub import HfApi

    on_progress(Event("upload", note=repository))
    api = HfApi()
    try:
        url = api.create_repo(repository, private=publication.private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=output, commit_message="Edited checkpoint")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(
            f"{output} is written, but could not be sent to {repository} on the hub ({reason_of(error)})"
        ) from error
    return str(url)
