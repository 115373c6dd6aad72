"""One shard after the other: captures edits, lets a writer find the change, gathers the evidence, writes the file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.edits import Edit
from wisecli.encode import in_batches
from wisecli.events import Event, Watcher
from wisecli.lessons import Lesson, capture_lessons, encode_edits, gather_evidence, keys_elsewhere, learnt
from wisecli.models import Loaded
from wisecli.moments import whitening
from wisecli.shard_directory import UNRELATED_NAME, ShardEntry
from wisecli.shards import Mask, Shard, disjoint_masks, random_mask, save_shard
from wisecli.site import Fingerprint, Site, load_matrix
from wisecli.storage import Checkpoint, sha256_file
from wisecli.unrelated import Unrelated, keys_of_texts, measure_unrelated, save_unrelated
from wisecli.writers.gradient import Progress, Task, write_batched, write_sequential
from wisecli.writers.solve import answered, fit_residuals, write_solved

_Outcome = tuple[Shard, tuple[float, ...], tuple[float, float] | None, dict[int, float]]


def unrelated_for(
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
    more = keys[calibrating]
    return replace(
        found,
        keys=torch.cat([found.keys, more]),
        chat=torch.cat([found.chat, torch.zeros(len(more), dtype=torch.bool)]),
        against=torch.cat([found.against, keys[~calibrating]]),
    )


class ShardWriter:
    """Writes one shard after the other, all against the same unrelated text; the last context is held back."""

    def __init__(
        self,
        loaded: Loaded,
        site: Site,
        settings: EditSettings,
        unrelated: Unrelated,
        edits: Sequence[Edit],
        contexts: Sequence[str],
        watch: Watcher,
    ) -> None:
        self.loaded, self.site, self.settings, self.unrelated = loaded, site, settings, unrelated
        self.edits, self.contexts, self.watch = edits, contexts, watch
        self.against = unrelated.against.to(loaded.device)
        self.unit = float(unrelated.size) if settings.margin_unit == "output" else 1.0
        self.white = whitening(unrelated.tokens)

    def write_all(self, working: Path, parts: Sequence[range]) -> tuple[tuple[ShardEntry, ...], list[str]]:
        """Write every shard file; names the edits that did not take."""
        save_unrelated(working / UNRELATED_NAME, self.unrelated)
        settings, generator = self.settings, torch.Generator().manual_seed(self.settings.seed)
        drawing = self.site, settings.mask_ratio, settings.mask_kind
        if settings.masks == "disjoint":
            masks = disjoint_masks(*drawing, len(parts), generator)
        else:
            masks = [random_mask(*drawing, generator) for _ in parts]
        entries, untaken = [], []
        for number, (part, mask) in enumerate(zip(parts, masks, strict=True)):
            entry, shares = self._write(working, f"{number + 1}/{len(parts)}", number, part, mask)
            entries.append(entry)
            untaken += [self.edits[place].id for place in part if shares[place] < 1]
        return tuple(entries), untaken

    def _write(
        self, working: Path, label: str, number: int, part: range, mask: Mask
    ) -> tuple[ShardEntry, dict[int, float]]:
        started = time.perf_counter()
        settings, stage = self.settings, f"shard {label}"
        self.watch(Event(stage))
        placed = mask.to(self.loaded.device)
        task = Task(self.loaded.model, self.site, placed, self.against, self.unit, settings)
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
            lambda keys, _answers, _positions: mask.update(mask.restrict(keys), values),
            self._elsewhere(part),
            self.white,
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
        white, elsewhere = self.white, self._elsewhere(part)
        last = len(self.contexts) - 1
        evidence = gather_evidence([*lessons, *held_back], last, _looked_up(residuals), elsewhere, white)
        middle = held_back[len(held_back) // 2 :][:1]
        mask = task.mask.to(torch.device("cpu"))
        columns = mask.indices if mask.kind == "columns" else None
        tokens = self.unrelated.tokens.dense(columns)
        solved = write_solved(task, evidence, tokens, lessons, middle, _passes(f"{stage} polish", self.watch))
        shares = answered(task, lessons, residuals)
        shard = Shard(mask, solved.values.cpu(), evidence)
        return shard, solved.losses, (solved.penalty.ridge, solved.penalty.unrelated), shares

    @property
    def _trained(self) -> list[tuple[int, str]]:
        return list(enumerate(self.contexts[:-1]))

    @property
    def _held_back(self) -> list[tuple[int, str]]:
        return [(len(self.contexts) - 1, self.contexts[-1])]

    def _elsewhere(self, part: Sequence[int]) -> dict[int, Tensor]:
        numbered = [(place, self.edits[place]) for place in part]
        settings = self.settings
        named = {"train_end": settings.train_end, "chat": settings.chat}
        return keys_elsewhere(self.loaded, self.site, numbered, batch_size=settings.batch_size, **named)

    def _capture(self, part: Sequence[int], contexts: Sequence[tuple[int, str]]) -> list[Lesson]:
        numbered = [(place, self.edits[place]) for place in part]
        size, train_end = self.settings.batch_size, self.settings.train_end
        return capture_lessons(self.loaded, self.site, numbered, contexts, batch_size=size, train_end=train_end)


def _looked_up(residuals: dict[int, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Residuals (n, d) by answer and position."""

    def find(_keys: Tensor, answers: Tensor, positions: Tensor) -> Tensor:
        pairs = zip(answers.tolist(), positions.tolist(), strict=True)
        return torch.stack([residuals[answer][position] for answer, position in pairs]).cpu()

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
