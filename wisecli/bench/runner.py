"""Who takes part in `wise bench`: the package's own commands, and the methods behind the protocol of baselines."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jsonlines
import torch

from wisecli.bench.baselines.base import METHODS, Bench, Method, UnsuitableError
from wisecli.bench.baselines.evaluation import Known, MethodSubject, overhead, said
from wisecli.commands.edit import edit
from wisecli.commands.evaluate import evaluate
from wisecli.commands.merge import merge
from wisecli.commands.run_options import RunOptions
from wisecli.config import BenchSettings, EditSettings, EvalSettings, LoadOptions, MergeSettings, resolve
from wisecli.data.corpus import unrelated_texts
from wisecli.edits.admission import AS_THEY_ARE
from wisecli.edits.record import Edit
from wisecli.environment import forget_peaks, peak_rss_bytes, peak_vram_bytes
from wisecli.evaluation.edited_model import attach
from wisecli.evaluation.metrics import Measuring
from wisecli.evaluation.protocols import Generated, measure_generated
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout_inference import find_layout
from wisecli.models.loading import Loaded, load_model
from wisecli.models.tokenization import encode
from wisecli.progress import Event, Watcher


@dataclass(frozen=True)
class Way:
    """One of our own ways to edit: the preset of `wise edit` and the mode of `wise merge`."""

    preset: Literal["default", "paper"] | None = None
    mode: Literal["merge", "retrieve", "lookup"] | None = None


OURS = {"wise": Way(), "wise-retrieve": Way(mode="retrieve"), "wise-paper": Way(preset="paper")}
# What these do to all edits together is something else than what they do to some and then to more.
_AT_ONCE = ("crispedit", "lora-paraphrased", "memit-mass")
_TEXTS = 200
_SHARE = 0.95
_TIMED = 32

ResultRow = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """What all take part in: the model, the records that are edited, and those that may be learnt from.

    ``domains`` names the dataset of each record that is edited.
    """

    directory: Path
    tested: Sequence[Edit]
    domains: Sequence[str]
    learnt: Sequence[Edit]
    settings: BenchSettings
    load: LoadOptions
    work: Path
    watch: Watcher
    known: Known = field(default_factory=Known)

    @cached_property
    def bench(self) -> Bench:
        """What methods behind the protocol may use; the model is loaded once for all of them."""
        checkpoint = Checkpoint(self.directory)
        layout = find_layout(self.directory, checkpoint, load=self.load, watch=self.watch)
        loaded = load_model(self.directory, self.load)
        texts = unrelated_texts(_TEXTS, seed=self.settings.seed)
        size, seed = self.settings.batch_size, self.settings.seed
        return Bench(loaded, checkpoint, layout, self.learnt, texts, size, seed, self.watch)

    def rows(self, name: str, counts: Sequence[int]) -> Iterator[ResultRow]:
        """A row for each number of edits of one method; or the reason why it cannot run."""
        yield from (self._ours if name in OURS else self._rival)(name, counts)

    def _rival(self, name: str, counts: Sequence[int]) -> Iterator[ResultRow]:
        method, seconds, done = None, 0.0, 0
        for count in counts:
            self.watch(Event(f"{name}, {count} edits"))
            forget_peaks()
            try:
                if method is None or name in _AT_ONCE:
                    method, seconds, done = METHODS[name](self.bench), 0.0, 0
                begun = time.perf_counter()
                method.edit([_plainly(edit) for edit in self.tested[done:count]])
                seconds, done = seconds + time.perf_counter() - begun, count
                yield self._measured(name, method, count, seconds)
            except UnsuitableError as error:
                yield {"method": name, "edits": count, "figures": {"cannot": str(error)}}

    def _measured(self, name: str, method: Method, count: int, seconds: float) -> ResultRow:
        size = self.settings.batch_size
        subject = MethodSubject(self.bench.loaded, method, self.known, batch_size=size, watch=self.watch)
        measuring = Measuring(subject, self.tested[:count], generate=self._answers_bare())
        edits, what = self.tested[:count], self._generated()
        with torch.random.fork_rng(devices=[]):
            length = measuring.answer_length()
            asked, _ = measure_generated(subject, what, edits, edits, max_new_tokens=length)
            measuring.run()
        costs = {"seconds_per_edit": seconds / count, "bytes": method.bytes()}
        costs["overhead"] = subject.overhead(self._timed(count))
        figures, before = {**asked.figures, **measuring.after}, {**asked.before, **measuring.before}
        return self._row(name, count, figures, before, {**asked.each, **measuring.each}, costs)

    def _generated(self) -> Generated:
        """Which generated figures are taken."""
        settings = self.settings
        return Generated(settings.protocol if settings.generate else "teacher", settings.forms, settings.ask)

    def _answers_bare(self) -> bool:
        """Whether all records' bare prompts are answered, too."""
        return self.settings.generate and self.settings.protocol != "wild"

    def _ours(self, name: str, counts: Sequence[int]) -> Iterator[ResultRow]:
        way = OURS[name]
        shards, memory, file = (self.work / part for part in ("shards", "memory", "edits.jsonl"))
        self.work.mkdir(parents=True, exist_ok=True)
        for count in counts:
            self.watch(Event(f"{name}, {count} edits"))
            forget_peaks()
            with jsonlines.open(file, "w") as writer:
                writer.write_all(record.as_dict() for record in self.tested[:count])
            settings = resolve(EditSettings, {"preset": way.preset, "seed": self.settings.seed}, section="edit")
            edited = edit(
                str(self.directory),
                file,
                shards,
                settings,
                load=self.load,
                options=RunOptions(force=True),
                admission=AS_THEY_ARE,
                watch=self.watch,
            )
            merged = merge([shards], memory, MergeSettings(mode=way.mode), force=True)
            given = EvalSettings(
                protocol=self.settings.protocol,
                forms=self.settings.forms,
                ask=self.settings.ask,
                generate=self.settings.generate,
                batch_size=self.settings.batch_size,
            )
            report = evaluate(memory, given, data=file, load=self.load, watch=self.watch)
            size = sum(path.stat().st_size for path in memory.iterdir())
            costs = {"seconds_per_edit": (edited.seconds + merged.seconds) / count, "bytes": size}
            costs["overhead"] = self._overhead(memory, count)
            yield self._row(name, count, report.figures, report.before, report.each, costs)

    def _overhead(self, memory: Path, count: int) -> float:
        """How much longer one pass over prompts and answers takes with a memory."""
        edited = attach(memory, load=self.load)
        loaded = Loaded(edited.model, edited.tokenizer, edited.stream)
        rows = [encode(edited.tokenizer, *pair) for pair in self._timed(count)]

        def run() -> None:
            said(loaded, rows, batch_size=self.settings.batch_size)

        def unedited() -> None:
            with edited.unedited():
                run()

        return overhead(run, unedited)

    def _timed(self, count: int) -> list[tuple[str, str]]:
        """Prompts and answers by which an edited model's time is taken."""
        return [(edit.prompt, edit.target) for edit in self.tested[: min(count, _TIMED)]]

    def _row(
        self,
        name: str,
        count: int,
        after: Mapping[str, float],
        before: Mapping[str, float],
        each: Mapping[str, Sequence[tuple[int, float]]],
        costs: Mapping[str, float],
    ) -> ResultRow:
        """Figures, their intervals, and every edit's own reliability, oldest first."""
        intervals = {figure: self._interval([value for _, value in values]) for figure, values in each.items()}
        figures = {**after, "before": dict(before), "intervals": intervals, **costs}
        figures |= {"peak_rss_bytes": peak_rss_bytes(), "by_age": [value for _, value in each.get("reliability", ())]}
        if vram := peak_vram_bytes():
            figures["peak_vram_bytes"] = vram
        if len(set(self.domains)) > 1:
            figures["domains"] = self._by_domain(each)
        return {"method": name, "edits": count, "figures": json.loads(json.dumps(figures))}

    def _by_domain(self, each: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, dict[str, float]]:
        """Every figure's mean over the edits of one dataset."""
        found: dict[str, dict[str, float]] = {}
        for figure, values in each.items():
            for domain in dict.fromkeys(self.domains):
                own = [value for place, value in values if self.domains[place] == domain]
                if own:
                    found.setdefault(domain, {})[figure] = statistics.fmean(own)
        return found

    def _interval(self, values: Sequence[float]) -> tuple[float, float]:
        return interval(values, resamples=self.settings.resamples, seed=self.settings.seed)


def _plainly(edit: Edit) -> Edit:
    """An edit in the terms of the papers, which know nothing but a prompt and its target.

    Raises:
        UnsuitableError: an answer is to be erased, and nothing to take its place.
    """
    if edit.erased:
        raise UnsuitableError("it has no way to erase an answer; give every such edit a `replacement`")
    return edit if edit.replacement is None else replace(edit, op="modify", target=edit.answer, replacement=None)


def interval(values: Sequence[float], *, resamples: int, seed: int) -> tuple[float, float]:
    """Bootstrap interval (95 %) of a mean over edits, by percentiles."""
    chance = random.Random(seed)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(resamples))
    cut = round((1 - _SHARE) / 2 * (len(means) - 1))
    return means[cut], means[len(means) - 1 - cut]
