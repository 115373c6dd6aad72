"""``wise edit``: edits → shards."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from wisecli.bases import find_model
from wisecli.config import EditSettings
from wisecli.edits import read_edits
from wisecli.errors import GateFailedError
from wisecli.events import Event, Watcher, ignore
from wisecli.infer import check_split, find_layout, observed
from wisecli.layers import probe_layer
from wisecli.lessons import encode_edits, write_contexts
from wisecli.models import load_model
from wisecli.pipeline.reports import peak_rss_bytes, versions
from wisecli.shard_directory import UNRELATED_NAME, ShardDirectory, write_shard_directory
from wisecli.shard_writer import ShardWriter, unrelated_for
from wisecli.shards import split_edits
from wisecli.site import Site, find_site, fingerprint
from wisecli.storage import Checkpoint, refuse_existing, require_space, sha256_file, whole_directory

# About what the statistics of unrelated text take: keys in half precision, two moments.
_KEPT_KEYS, _KEPT_DIRECTIONS = 4096, 1024


@dataclass(frozen=True)
class EditReport:
    """What ``wise edit`` did, or with ``planned`` would do.

    ``untaken`` names the edits of whose target some token is not the arg-max after the bare prompt, before merging:
    with what the gradient writer trained, or with the residuals that the closed form found.
    """

    output: Path
    edits: int
    shards: int
    layer: int
    module: str
    seconds: float
    peak_rss_bytes: int
    untaken: tuple[str, ...] = ()
    planned: bool = False

    @property
    def seconds_per_edit(self) -> float:
        """Whole running time, loading included, over the edits."""
        return self.seconds / self.edits


def edit(
    model: str,
    edits_file: Path,
    output: Path,
    settings: EditSettings,
    *,
    revision: str | None = None,
    target_module: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    memory_budget: int | None = None,
    watch: Watcher = ignore,
) -> EditReport:
    """Write each shard of edits into a delta of the model's value matrix.

    Args:
        model: a directory, a hub id or a GGUF file.
        target_module: path of the value matrix, with ``{layer}`` for the layer's index, where the table's is not meant.
        strict: raise if an edit did not take; nothing is written then.
        dry_run: check everything and plan, but load no weights and write nothing.
        memory_budget: about how many bytes there are; of a model that does not fit, layers are read as they run.

    Raises:
        WiseError: any of the input, the model or the disk cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    edits = read_edits(edits_file)
    refuse_existing(output, force=force)
    directory = find_model(model, revision=revision, watch=watch)
    checkpoint = Checkpoint(directory)
    layout = find_layout(
        directory, checkpoint, target_module=target_module, trust_remote_code=trust_remote_code, watch=watch
    )
    site = find_site(directory, checkpoint, settings.layer, layout)
    parts = split_edits(len(edits), shards=settings.shards, edits_per_shard=settings.edits_per_shard)
    require_space(output, _expected_bytes(site, settings, len(edits), len(parts)))
    if dry_run:
        seconds, peak = time.perf_counter() - started, _expected_peak(checkpoint, site, settings, len(edits))
        return EditReport(output, len(edits), len(parts), site.layer, site.module, seconds, peak, planned=True)
    base = fingerprint(directory, checkpoint, site)
    watch(Event("model"))
    loaded = load_model(
        directory,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        layers=layout.layers,
        memory_budget=memory_budget,
    )
    if not layout.known:
        if loaded.stream is not None:
            loaded.stream.hold([site.layer])
        layout = observed(loaded.model, site, layout)
        site = find_site(directory, checkpoint, settings.layer, layout)
        check_split(loaded.model, site)
    encode_edits(loaded, edits, "", train_end=settings.train_end)
    if settings.layer == "auto" and settings.writer == "solve":
        size = settings.batch_size
        site = probe_layer(loaded, directory, checkpoint, base, batch_size=size, watch=watch, layout=layout)
        base = fingerprint(directory, checkpoint, site)
    stored = str(directory.absolute()) if Path(model).exists() else model
    with whole_directory(output, force=force) as working:
        contexts = write_contexts(
            loaded, settings.contexts, tokens=settings.context_tokens, chat=settings.chat, seed=settings.seed
        )
        unrelated = unrelated_for(loaded, site, checkpoint, base, settings, edits, watch)
        if loaded.stream is not None:
            loaded.stream.hold(range(site.layer + 1, len(loaded.stream.layers)))
        writer = ShardWriter(loaded, site, settings, unrelated, edits, contexts, watch)
        entries, untaken = writer.write_all(working, parts)
        if strict and untaken:
            raise GateFailedError(f"{len(untaken)} of {len(edits)} edits did not take: {', '.join(untaken)}")
        digest = sha256_file(working / UNRELATED_NAME)
        record = asdict(settings)
        write_shard_directory(
            ShardDirectory(
                working,
                stored,
                revision,
                base,
                site,
                record,
                tuple(contexts),
                tuple(edits),
                entries,
                digest,
                versions(),
            )
        )
    seconds = time.perf_counter() - started
    return EditReport(
        output, len(edits), len(parts), site.layer, site.module, seconds, peak_rss_bytes(), tuple(untaken)
    )


def _expected_bytes(site: Site, settings: EditSettings, edits: int, shards: int) -> int:
    """Size of the shards to be written, taking six key positions an edit and context."""
    keys = edits * (settings.contexts + 2) * 6
    size = settings.mask_ratio * site.d * site.d_ff * (4 if settings.mask_kind == "columns" else 8)
    return round(shards * size + 2 * keys * (site.d + site.d_ff) + (2 * _KEPT_KEYS + 4 * _KEPT_DIRECTIONS) * site.d_ff)


def _expected_peak(checkpoint: Checkpoint, site: Site, settings: EditSettings, edits: int) -> int:
    """Rough peak memory in bytes: weights, captured activations, the delta with its gradient and moments."""
    weights = sum(path.stat().st_size for path in checkpoint.files)
    rows = min(edits, settings.edits_per_shard) * (settings.contexts + 2)
    activations = rows * 8 * (site.d + site.d_ff) * 4 + settings.unrelated_texts * 16 * site.d_ff * 4
    return weights + activations + 16 * round(settings.mask_ratio * site.d * site.d_ff)
