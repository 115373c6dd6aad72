"""``wise eval``: reliability, generalization, locality, portability and generated answers, before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wisecli.attached import Edited, attach
from wisecli.config import EvalSettings
from wisecli.contexts import chat_prompt
from wisecli.datasets import BENCHMARKS
from wisecli.edits import Edit, read_edits
from wisecli.encode import Row, encode
from wisecli.errors import GateFailedError, ModelError, SettingsError
from wisecli.evaluate import Measured, Reading, generated, teacher_forced
from wisecli.events import Watcher, ignore
from wisecli.fetch import fetch_benchmark
from wisecli.manifest import Manifest
from wisecli.pipeline.reports import peak_rss_bytes, versions

_ANSWER_MARGIN, _ANSWER_LIMIT = 8, 256
LOWER_IS_BETTER = ("perplexity", "perplexity_median", "perplexity_clipped")


@dataclass(frozen=True)
class EvalReport:
    """Figures of one dataset; the JSON form has lm-eval's keys."""

    dataset: str
    after: dict[str, float]
    before: dict[str, float]
    samples: dict[str, int]
    config: dict[str, Any]
    seconds: float
    peak_rss_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        return {
            "results": {self.dataset: {**self.after, "before": self.before}},
            "config": self.config,
            "versions": versions(),
            "n-samples": {self.dataset: self.samples},
            "higher_is_better": {self.dataset: {name: name not in LOWER_IS_BETTER for name in self.after}},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def check(self, gates: Mapping[str, float]) -> None:
        """Raise if a figure misses its gate (for perplexities, lies above it).

        Raises:
            GateFailedError: naming every figure that does.
            SettingsError: a gate names a figure that was not measured.
        """
        failed = []
        for name, gate in gates.items():
            if name not in self.after:
                raise SettingsError(f"--fail-under {name}: not measured here; measured are {', '.join(self.after)}")
            value = self.after[name]
            if value > gate if name in LOWER_IS_BETTER else value < gate:
                failed.append(f"{name} is {value:.3f}, not {gate:g}")
        if failed:
            raise GateFailedError("gate failed: " + "; ".join(failed))


def evaluate(
    memory: Path,
    settings: EvalSettings,
    *,
    model: str | None = None,
    data: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
    watch: Watcher = ignore,
) -> EvalReport:
    """Measure an edited model on a dataset, or on its own edits.

    Args:
        memory: a memory directory or an exported one.
        model: where the base model is now, if not where the manifest says.
        memory_budget: about how many bytes there are; of a model that does not fit, layers are read as they run.
        data: the dataset's file; if not given it is fetched.

    Raises:
        WiseError: the data, the memory or the model cannot be used.
    """
    started = time.perf_counter()
    name, records = _dataset(settings.dataset, data)
    loading = {"device": device, "dtype": dtype}
    edited = attach(memory, model=model, **loading, trust_remote_code=trust_remote_code, memory_budget=memory_budget)
    manifest = edited.manifest
    records = _selected(records if records is not None else manifest.edits, manifest.edits, settings.edits)
    measuring = _Measuring(edited, records, settings, watch)
    measuring.run()
    if name in BENCHMARKS and not BENCHMARKS[name].perplexity:
        measuring.drop("perplexity")
    config = {**asdict(settings), "memory": str(memory), "model": manifest.model, "merge": manifest.merge}
    seconds = time.perf_counter() - started
    figures = measuring.after, measuring.before, {"edits": len(records), **measuring.samples}
    return EvalReport(name, *figures, config, seconds, peak_rss_bytes())


def _dataset(dataset: str | None, data: Path | None) -> tuple[str, Sequence[Edit] | None]:
    if dataset in BENCHMARKS:
        return str(dataset), read_edits(data or fetch_benchmark(str(dataset)))
    if data is not None:
        return dataset or data.stem, read_edits(data)
    if dataset is None:
        return "edits", None
    if not Path(dataset).exists():
        raise SettingsError(f"--dataset {dataset}: neither a file nor one of {', '.join(BENCHMARKS)}")
    return Path(dataset).stem, read_edits(Path(dataset))


def _selected(records: Sequence[Edit], held: Sequence[Edit], limit: int | None) -> list[Edit]:
    """The first ``limit`` records; without a limit those that the memory holds, or all if it holds none."""
    if limit is not None:
        return list(records[:limit])
    known = {(edit.prompt, edit.target) for edit in held}
    return [edit for edit in records if (edit.prompt, edit.target) in known] or list(records)


class _Measuring:
    """Collects figures under the same names before and after editing."""

    def __init__(self, edited: Edited, records: Sequence[Edit], settings: EvalSettings, watch: Watcher) -> None:
        self.edited, self.records, self.settings, self.watch = edited, records, settings, watch
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.samples: dict[str, int] = {}

    def run(self) -> None:
        reliability = self._run("reliability", [[(edit.prompt, edit.target)] for edit in self.records])
        self._perplexity(reliability)
        rephrased = self._run(
            "generalization", [[(text, edit.target) for text in edit.rephrases] for edit in self.records]
        )
        self._routing(rephrased)
        self._locality()
        self._run("portability", [[(p.prompt, p.answer) for p in edit.portability] for edit in self.records])
        self._ood()
        if self.settings.generate:
            self._generated()

    def drop(self, prefix: str) -> None:
        """Leave out figures that mean nothing for this dataset."""
        for figures in (self.before, self.after):
            for name in [name for name in figures if name.startswith(prefix)]:
                del figures[name]

    def _run(self, name: str, groups: Sequence[Sequence[tuple[str, str]]]) -> list[Measured]:
        """Share of target tokens that are the arg-max: mean over an edit's probes, then over edits."""
        measured = self._measure(name, groups, prompt_opens=True)
        self._record(name, measured, lambda reading: reading.right)
        return [one for group in measured for one in group]

    def _measure(
        self, name: str, groups: Sequence[Sequence[tuple[str, str]]], *, prompt_opens: bool
    ) -> list[list[Measured]]:
        rows = [self._encode(prompt, target) for group in groups for prompt, target in group]
        size, watch = self.settings.batch_size, self.watch
        flat = iter(
            teacher_forced(self.edited, rows, batch_size=size, prompt_opens=prompt_opens, stage=name, watch=watch)
        )
        return [[next(flat) for _ in group] for group in groups if group]

    def _encode(self, prompt: str, target: str) -> Row:
        try:
            return encode(self.edited.tokenizer, self._asked(prompt), target)
        except ValueError as error:
            raise ModelError(f"a record cannot be measured: {error}; reword {prompt!r}") from None

    def _asked(self, prompt: str) -> str:
        return chat_prompt(self.edited.tokenizer, prompt) if self.settings.chat else prompt

    def _record(self, name: str, groups: Sequence[Sequence[Measured]], value: Callable[[Reading], float]) -> None:
        if groups:
            self.before[name] = _mean_of_means(groups, lambda one: value(one.before))
            self.after[name] = _mean_of_means(groups, lambda one: value(one.after))
            self.samples[name] = sum(map(len, groups))

    def _locality(self) -> None:
        groups = [[(probe.prompt, probe.answer) for probe in edit.locality] for edit in self.records]
        measured = self._measure("locality", groups, prompt_opens=False)
        if measured:
            self.before["locality"] = 1.0
            self.after["locality"] = _mean_of_means(measured, lambda one: one.same)
            self.samples["locality"] = sum(map(len, measured))

    def _routing(self, rephrased: Sequence[Measured]) -> None:
        """Share of rephrases that open the memory which holds their edit."""
        numbers = memory_numbers(self.edited.manifest)
        wanted = [numbers.get((edit.prompt, edit.target)) for edit in self.records for _ in edit.rephrases]
        pairs = [(one.opened, number) for one, number in zip(rephrased, wanted, strict=True) if number is not None]
        if pairs:
            self.before["routing"] = 0.0
            self.after["routing"] = statistics.fmean(opened == number for opened, number in pairs)
            self.samples["routing"] = len(pairs)

    def _perplexity(self, measured: Sequence[Measured]) -> None:
        for figures, readings in (
            (self.before, [one.before for one in measured]),
            (self.after, [one.after for one in measured]),
        ):
            values = [reading.perplexity for reading in readings]
            figures["perplexity"] = statistics.fmean(values)
            figures["perplexity_median"] = statistics.median(values)
            figures["perplexity_clipped"] = statistics.fmean(min(value, 100.0) for value in values)

    def _ood(self) -> None:
        """Share of a free text's tokens that the model is sure of, after the prompt it opens with."""
        groups = [[_split(text, edit) for text in edit.ood] for edit in self.records]
        measured = self._measure("ood", groups, prompt_opens=False)
        self._record("ood_generalization", measured, lambda reading: reading.known)

    def _generated(self) -> None:
        prompts = [self._asked(edit.prompt) for edit in self.records]
        targets = [edit.target.strip() for edit in self.records]
        longest = max(len(self._encode(edit.prompt, edit.target).target) for edit in self.records)
        limit = self.settings.max_new_tokens or min(longest + _ANSWER_MARGIN, _ANSWER_LIMIT)
        answers = generated(
            self.edited, prompts, max_new_tokens=limit, batch_size=self.settings.batch_size, watch=self.watch
        )
        for figures, texts in zip((self.before, self.after), answers, strict=True):
            pairs = list(zip(texts, targets, strict=True))
            figures["generated_exact"] = statistics.fmean(text == target for text, target in pairs)
            figures["generated_contains"] = statistics.fmean(target in text for text, target in pairs)
        self.samples["generated"] = len(prompts)


def memory_numbers(manifest: Manifest) -> dict[tuple[str, str], int]:
    """The number of the memory that holds each edit, by its prompt and target; a lookup counts every edit as one."""
    if manifest.memory.kind == "lookup":
        return {(edit.prompt, edit.target): number for number, edit in enumerate(manifest.edits)}
    owner = {name: number for number, owned in enumerate(manifest.owners) for name in owned}
    return {(edit.prompt, edit.target): owner[edit.id] for edit in manifest.edits if edit.id in owner}


def _mean_of_means(groups: Sequence[Sequence[Measured]], value: Callable[[Measured], float]) -> float:
    return statistics.fmean(statistics.fmean(value(one) for one in group) for group in groups)


def _split(text: str, edit: Edit) -> tuple[str, str]:
    """A free text as the prompt it opens with and the rest; without one, its first word is the prompt."""
    prompt = edit.prompt if text.startswith(edit.prompt) else text.split(maxsplit=1)[0]
    return prompt, text[len(prompt) :].lstrip() or text
