"""``wise edit``: edits → shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.edits import Edit, read_edits
from wisecli.errors import GateFailedError
from wisecli.events import Event, Watcher, ignore
from wisecli.lessons import (
    Lesson,
    capture_lessons,
    encode_edits,
    gather_evidence,
    learnt,
    unrelated_keys,
    write_contexts,
)
from wisecli.models import Loaded, load_model
from wisecli.pipeline.reports import peak_rss_bytes, versions
from wisecli.shard_directory import UNRELATED_NAME, ShardDirectory, ShardEntry, write_shard_directory
from wisecli.shards import Shard, describe_unrelated, random_mask, save_shard, save_unrelated, split_edits
from wisecli.site import Site, find_site, fingerprint, load_matrix
from wisecli.storage import Checkpoint, refuse_existing, require_space, resolve_model, sha256_file, whole_directory
from wisecli.writers.gradient import Progress, Task, write_batched, write_sequential

# Unrelated keys kept for calibration, and rank of what is kept of their covariance.
_SAMPLE, _RANK = 4096, 512


@dataclass(frozen=True)
class EditReport:
    """What ``wise edit`` did, or with ``planned`` would do.

    ``untaken`` names the edits of whose target some token is not the arg-max after the bare prompt, before merging.
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
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    watch: Watcher = ignore,
) -> EditReport:
    """Write each shard of edits into a delta of the model's value matrix.

    Args:
        model: a directory or a hub id.
        strict: raise if an edit did not take; nothing is written then.
        dry_run: check everything and plan, but load no weights and write nothing.

    Raises:
        WiseError: any of the input, the model or the disk cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    edits = read_edits(edits_file)
    refuse_existing(output, force=force)
    directory = resolve_model(model, revision=revision)
    checkpoint = Checkpoint(directory)
    site = find_site(directory, checkpoint, settings.layer)
    parts = split_edits(len(edits), shards=settings.shards, edits_per_shard=settings.edits_per_shard)
    require_space(output, _expected_bytes(site, settings, len(edits), len(parts)))
    if dry_run:
        seconds, peak = time.perf_counter() - started, _expected_peak(checkpoint, site, settings, len(edits))
        return EditReport(output, len(edits), len(parts), site.layer, site.module, seconds, peak, planned=True)
    base = fingerprint(directory, checkpoint, site)
    watch(Event("model"))
    loaded = load_model(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    encode_edits(loaded, edits, "", train_end=settings.train_end)
    stored = str(directory.absolute()) if Path(model).is_dir() else model
    with whole_directory(output, force=force) as working:
        contexts = write_contexts(loaded, settings.contexts, tokens=settings.context_tokens, seed=settings.seed)
        writer = _Writer(loaded, site, settings, checkpoint, edits, contexts, watch)
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


class _Writer:
    """Writes one shard after the other, all against the same unrelated text."""

    def __init__(
        self,
        loaded: Loaded,
        site: Site,
        settings: EditSettings,
        checkpoint: Checkpoint,
        edits: Sequence[Edit],
        contexts: Sequence[str],
        watch: Watcher,
    ) -> None:
        self.loaded, self.site, self.settings = loaded, site, settings
        self.edits, self.contexts, self.watch = edits, contexts, watch
        texts, size = settings.unrelated_texts, settings.batch_size
        keys, unseen = unrelated_keys(
            loaded, site, edits, texts=texts, batch_size=size, seed=settings.seed, watch=watch
        )
        keys = keys.float()
        self.negatives = keys[~unseen]
        self.unrelated = describe_unrelated(keys.cpu(), unseen.cpu(), sample=_SAMPLE, rank=_RANK)
        self.unit = _unit(keys, load_matrix(checkpoint, site)) if settings.margin_unit == "output" else 1.0

    def write_all(self, working: Path, parts: Sequence[range]) -> tuple[tuple[ShardEntry, ...], list[str]]:
        """Write every shard file; names the edits that did not take."""
        save_unrelated(working / UNRELATED_NAME, self.unrelated)
        generator = torch.Generator().manual_seed(self.settings.seed)
        entries, untaken = [], []
        for number, part in enumerate(parts):
            entry, shares = self._write(working, number, len(parts), part, generator)
            entries.append(entry)
            untaken += [self.edits[place].id for place in part if shares[place] < 1]
        return tuple(entries), untaken

    def _write(
        self, working: Path, number: int, count: int, part: range, generator: torch.Generator
    ) -> tuple[ShardEntry, dict[int, float]]:
        started = time.perf_counter()
        settings, stage = self.settings, f"shard {number + 1}/{count}"
        mask = random_mask(self.site, settings.mask_ratio, settings.mask_kind, generator).to(self.loaded.device)
        self.watch(Event(stage))
        lessons = self._lessons(part)
        write = write_batched if settings.schedule == "batched" else write_sequential
        task = Task(self.loaded.model, self.site, mask, self.negatives, self.unit, settings)
        written = write(task, lessons, _passes(stage, self.watch))
        shares = learnt(self.loaded, self.site, mask, written.values, lessons)
        unseen = self._capture(part, [(len(self.contexts) - 1, self.contexts[-1])])
        mask = mask.to(torch.device("cpu"))
        evidence = gather_evidence([*lessons, *unseen], mask, written.values, len(self.contexts) - 1)
        path = working / f"shard-{number:05d}.safetensors"
        ids = tuple(self.edits[place].id for place in part)
        save_shard(path, Shard(mask, written.values.cpu(), evidence), seed=settings.seed, edits=ids)
        seconds = time.perf_counter() - started
        return ShardEntry(path.name, sha256_file(path), mask.kind, ids, written.losses, round(seconds, 3)), shares

    def _lessons(self, part: range) -> list[Lesson]:
        trained = list(enumerate(self.contexts[:-1]))
        if self.settings.schedule == "batched":
            return self._capture(part, trained)
        return [lesson for place in part for lesson in self._capture(range(place, place + 1), trained)]

    def _capture(self, part: range, contexts: Sequence[tuple[int, str]]) -> list[Lesson]:
        numbered = [(place, self.edits[place]) for place in part]
        size, train_end = self.settings.batch_size, self.settings.train_end
        return capture_lessons(self.loaded, self.site, numbered, contexts, batch_size=size, train_end=train_end)


def _passes(stage: str, watch: Watcher) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        note = f"loss {progress.loss:.3f}, {progress.accuracy:.0%} of target tokens"
        watch(Event(stage, progress.step, progress.steps, note))

    return tell


def _unit(keys: Tensor, matrix: Tensor) -> float:
    """The median of ``‖W a‖₂`` over unrelated text."""
    return float((keys @ matrix.to(keys).T).norm(dim=-1).median())


def _expected_bytes(site: Site, settings: EditSettings, edits: int, shards: int) -> int:
    """Size of the shards to be written, taking six key positions an edit and context."""
    keys = edits * (settings.contexts + 2) * 6
    size = settings.mask_ratio * site.d * site.d_ff * (4 if settings.mask_kind == "columns" else 8)
    return round(shards * size + 2 * keys * (site.d + site.d_ff) + (2 * _SAMPLE + 4 * _RANK) * site.d_ff)


def _expected_peak(checkpoint: Checkpoint, site: Site, settings: EditSettings, edits: int) -> int:
    """Rough peak memory in bytes: weights, captured activations, the delta with its gradient and moments."""
    weights = sum(path.stat().st_size for path in checkpoint.files)
    rows = min(edits, settings.edits_per_shard) * (settings.contexts + 2)
    activations = rows * 8 * (site.d + site.d_ff) * 4 + settings.unrelated_texts * 16 * site.d_ff * 4
    return weights + activations + 16 * round(settings.mask_ratio * site.d * site.d_ff)
