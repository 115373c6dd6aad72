"""``wise edit``: edits → shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.edits import Edit, read_edits
from wisecli.encode import in_batches
from wisecli.errors import GateFailedError
from wisecli.events import Event, Watcher, ignore
from wisecli.layers import probe_layer
from wisecli.lessons import (
    Lesson,
    capture_lessons,
    encode_edits,
    gather_evidence,
    keys_elsewhere,
    learnt,
    write_contexts,
)
from wisecli.models import Loaded, load_model
from wisecli.pipeline.reports import peak_rss_bytes, versions
from wisecli.shard_directory import UNRELATED_NAME, ShardDirectory, ShardEntry, write_shard_directory
from wisecli.shards import Shard, random_mask, save_shard, split_edits
from wisecli.site import Fingerprint, Site, find_site, fingerprint, load_matrix
from wisecli.storage import Checkpoint, refuse_existing, require_space, resolve_model, sha256_file, whole_directory
from wisecli.unrelated import Unrelated, keys_of_texts, measure_unrelated, save_unrelated, whitening
from wisecli.writers.gradient import Progress, Task, write_batched, write_sequential
from wisecli.writers.solve import fit_residuals, write_solved

# About what the statistics of unrelated text take: keys in half precision, two moments.
_KEPT_KEYS, _KEPT_DIRECTIONS = 4096, 1024


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


_Outcome = tuple[Shard, tuple[float, ...], tuple[float, float] | None, dict[int, float]]


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
    if settings.layer == "auto" and settings.writer == "solve":
        site = probe_layer(loaded, directory, checkpoint, base, batch_size=settings.batch_size, watch=watch)
        base = fingerprint(directory, checkpoint, site)
    stored = str(directory.absolute()) if Path(model).is_dir() else model
    with whole_directory(output, force=force) as working:
        contexts = write_contexts(
            loaded, settings.contexts, tokens=settings.context_tokens, chat=settings.chat, seed=settings.seed
        )
        writer = _Writer(loaded, site, settings, _unrelated(loaded, site, checkpoint, base, settings, edits, watch))
        writer.take(edits, contexts, watch)
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


def _unrelated(
    loaded: Loaded,
    site: Site,
    checkpoint: Checkpoint,
    base: Fingerprint,
    settings: EditSettings,
    edits: Sequence[Edit],
    watch: Watcher,
) -> Unrelated:
    """What the model makes of unrelated text; of the texts given with the edits, half calibrate."""
    size, seed = settings.batch_size, settings.seed
    found = measure_unrelated(
        loaded,
        site,
        load_matrix(checkpoint, site).to(loaded.device),
        base,
        texts=settings.unrelated_texts,
        chat=settings.chat,
        batch_size=size,
        seed=seed,
        watch=watch,
    )
    given = [text for edit in edits for text in edit.irrelevant]
    if not given:
        return found
    keys, text, _ = keys_of_texts(loaded, site, given, batch_size=size, watch=watch)
    keys, calibrating = keys.cpu(), (text % 2 == 0).cpu()
    joined = torch.cat([found.keys, keys[calibrating]]), torch.cat([found.against, keys[~calibrating]])
    return replace(found, keys=joined[0], against=joined[1])


class _Writer:
    """Writes one shard after the other, all against the same unrelated text."""

    edits: Sequence[Edit]
    contexts: Sequence[str]
    watch: Watcher

    def __init__(self, loaded: Loaded, site: Site, settings: EditSettings, unrelated: Unrelated) -> None:
        self.loaded, self.site, self.settings, self.unrelated = loaded, site, settings, unrelated
        self.against = unrelated.against.to(loaded.device)
        self.unit = float(unrelated.size) if settings.margin_unit == "output" else 1.0

    def take(self, edits: Sequence[Edit], contexts: Sequence[str], watch: Watcher) -> None:
        """What to write: edits under contexts, the last of which is held back."""
        self.edits, self.contexts, self.watch = edits, contexts, watch

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
        task = Task(self.loaded.model, self.site, mask, self.against, self.unit, settings)
        solving = settings.writer == "solve"
        shard, losses, penalty, shares = (self._solve if solving else self._train)(task, part, stage)
        path = working / f"shard-{number:05d}.safetensors"
        ids = tuple(self.edits[place].id for place in part)
        save_shard(path, shard, seed=settings.seed, edits=ids)
        seconds = round(time.perf_counter() - started, 3)
        return ShardEntry(path.name, sha256_file(path), mask.kind, ids, losses, seconds, penalty), shares

    def _train(self, task: Task, part: range, stage: str) -> _Outcome:
        """The paper's writer: the residuals are what the trained change adds."""
        each = self.settings.schedule == "sequential"
        groups = [range(place, place + 1) for place in part] if each else [part]
        lessons = [lesson for group in groups for lesson in self._capture(group, self._trained)]
        write = write_sequential if each else write_batched
        written = write(task, lessons, _passes(stage, self.watch))
        shares = learnt(task.model, self.site, task.mask, written.values, lessons)
        values, mask = written.values.cpu(), task.mask.to(torch.device("cpu"))
        evidence = gather_evidence(
            [*lessons, *self._capture(part, self._held_back)],
            len(self.contexts) - 1,
            lambda keys, _edits, _positions: mask.update(mask.restrict(keys), values),
            self._elsewhere(part),
            whitening(self.unrelated.tokens),
        )
        return Shard(mask, values, evidence), written.losses, None, shares

    def _solve(self, task: Task, part: range, stage: str) -> _Outcome:
        """The closed form: residuals first, then one solve."""
        rows = encode_edits(self.loaded, [self.edits[place] for place in part], "", train_end=self.settings.train_end)
        groups = [
            self._capture([part[index] for index in indices], self._trained)
            for indices in in_batches(rows, self.settings.batch_size, by_target=True)
        ]
        lessons = [lesson for group in groups for lesson in group]
        residuals = fit_residuals(task, groups, _fitting(stage, self.watch))
        held_back = self._capture(part, self._held_back)
        white, elsewhere = whitening(self.unrelated.tokens), self._elsewhere(part)
        last = len(self.contexts) - 1
        evidence = gather_evidence([*lessons, *held_back], last, _looked_up(residuals), elsewhere, white)
        tokens = self.unrelated.tokens.dense()
        middle = held_back[len(held_back) // 2 :][:1]
        solved = write_solved(task, evidence, tokens, lessons, middle, _passes(f"{stage} polish", self.watch))
        shares = learnt(task.model, self.site, task.mask, solved.values, lessons)
        shard = Shard(task.mask.to(torch.device("cpu")), solved.values.cpu(), evidence)
        return shard, solved.losses, (solved.penalty.ridge, solved.penalty.unrelated), shares

    @property
    def _trained(self) -> list[tuple[int, str]]:
        return list(enumerate(self.contexts[:-1]))

    @property
    def _held_back(self) -> list[tuple[int, str]]:
        return [(len(self.contexts) - 1, self.contexts[-1])]

    def _elsewhere(self, part: Sequence[int]) -> dict[int, Tensor]:
        numbered = [(place, self.edits[place]) for place in part]
        size, train_end = self.settings.batch_size, self.settings.train_end
        return keys_elsewhere(self.loaded, self.site, numbered, batch_size=size, train_end=train_end)

    def _capture(self, part: Sequence[int], contexts: Sequence[tuple[int, str]]) -> list[Lesson]:
        numbered = [(place, self.edits[place]) for place in part]
        size, train_end = self.settings.batch_size, self.settings.train_end
        return capture_lessons(self.loaded, self.site, numbered, contexts, batch_size=size, train_end=train_end)


def _looked_up(residuals: dict[int, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Residuals (n, d) by edit and position."""

    def find(_keys: Tensor, edits: Tensor, positions: Tensor) -> Tensor:
        pairs = zip(edits.tolist(), positions.tolist(), strict=True)
        return torch.stack([residuals[edit][position] for edit, position in pairs]).cpu()

    return find


def _fitting(stage: str, watch: Watcher) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        watch(Event(stage, progress.step, progress.steps, f"loss {progress.loss:.3f}"))

    return tell


def _passes(stage: str, watch: Watcher) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        note = f"loss {progress.loss:.3f}, {progress.accuracy:.0%} of target tokens"
        watch(Event(stage, progress.step, progress.steps, note))

    return tell


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
