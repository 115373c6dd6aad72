"""``wise eval``: answers in the forms that people ask in, and below them teacher-forced figures, before and after."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.commands.measure.fetch import fetch_benchmark
from wisecli.config import EvalSettings, LoadOptions
from wisecli.edits.reading.field_names import BENCHMARKS
from wisecli.edits.record import Edit, consequences_in, read_edits
from wisecli.environment import peak_rss_bytes, versions
from wisecli.errors import GateFailedError, SettingsError
from wisecli.evaluation.answers import Books
from wisecli.evaluation.edited_model import attach
from wisecli.evaluation.memory_subject import MemorySubject
from wisecli.evaluation.metrics import Measuring, is_figure, lower_is_better
from wisecli.evaluation.protocols import Generated, ProtocolName, measure_generated
from wisecli.models.prompts.chat_template import date_of
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class EvalReport:
    """Figures of one dataset; the JSON form has lm-eval's keys.

    ``asked`` are generated answers, in forms and kinds or by WILD; ``after`` and ``before`` all else. ``each`` has a
    figure's value for every edit, by its place.
    """

    dataset: str
    after: dict[str, float]
    before: dict[str, float]
    samples: dict[str, int]
    config: dict[str, Any]
    seconds: float
    peak_rss_bytes: int
    each: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """All figures of the edited model, those of generated answers first."""
        return {**self.asked, **self.after}

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        return {
            "results": {self.dataset: {**self.figures, "before": self.before}},
            "config": self.config,
            "versions": versions(),
            "n-samples": {self.dataset: self.samples},
            "higher_is_better": {self.dataset: {name: not lower_is_better(name) for name in self.figures}},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def check(self, thresholds: Mapping[str, float], *, if_measured: bool = False) -> tuple[str, ...]:
        """Raise if a figure misses its threshold.

        Args:
            if_measured: pass over figures that these records do not measure, as long as there is another.

        Returns:
            The figures that were passed over.

        Raises:
            GateFailedError: naming every figure that does.
            SettingsError: a threshold names a figure that was not measured, or is none.
        """
        figures = self.figures
        missing = tuple(name for name in thresholds if name not in figures)
        wrong = [name for name in missing if not (if_measured and is_figure(name))]
        if wrong or (missing and len(missing) == len(thresholds)):
            name = (wrong or missing)[0]
            known = ", ".join(figure for figure in figures if "/" not in figure)
            raise SettingsError(f"--fail-under {name}: not measured here; measured are {known}")
        failed = []
        for name, threshold in thresholds.items():
            value = figures.get(name, threshold)
            if value > threshold if lower_is_better(name) else value < threshold:
                failed.append(f"{name} is {value:.3f}, not {threshold:g}")
        if failed:
            raise GateFailedError("gate failed: " + "; ".join(failed))
        return missing


def evaluate(
    memory: Path,
    settings: EvalSettings,
    *,
    model: str | None = None,
    data: Path | None = None,
    load: LoadOptions = LoadOptions(),
    oracle: bool = False,
    known: Books | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> EvalReport:
    """Measure an edited model on a dataset, or on its own edits.

    Args:
        memory: a memory directory or an exported one.
        model: where the base model is now, if not where the manifest says.
        data: the dataset's file; if not given it is fetched.
        oracle: whether an edit's prompt and rephrases are answered by the memory that holds it, whatever the router
            says: what is left to gain by a better router.
        known: what was answered already.

    Raises:
        WiseError: the data, the memory or the model cannot be used.
    """
    started = time.perf_counter()
    what = _generated(settings)
    name, given = _dataset(settings.dataset, data)
    edited = attach(memory, model=model, load=load)
    manifest = edited.manifest
    if given is None and not manifest.edits:
        raise SettingsError(f"{memory} holds no edit to be measured by; give a --dataset, or records by --data")
    selected = _selected(given if given is not None else manifest.edits, manifest.edits, settings.edits)
    numbers = memory_numbers(manifest)
    followed = _consequences(selected, manifest.edits)
    records = [edit for edit in selected if edit.consequence_of is None] or selected
    subject = MemorySubject(edited, settings, on_progress, _holders(records, numbers) if oracle else None, known)
    measuring = Measuring(
        subject,
        records,
        consequences=followed,
        numbers=numbers,
        generate=settings.generate and not what.by_wild,
        max_new_tokens=settings.max_new_tokens,
    )
    every = list(dict.fromkeys([*records, *(given or ()), *manifest.edits]))
    asked, forms = measure_generated(subject, what, records, every, max_new_tokens=measuring.answer_length())
    measuring.run()
    if name in BENCHMARKS and not BENCHMARKS[name].perplexity:
        measuring.drop("perplexity")
    config = {**asdict(settings), **({"asked_forms": forms} if forms else {})}
    config |= {"memory": str(memory), "model": manifest.model, "merge": manifest.merge}
    return EvalReport(
        name,
        measuring.after,
        {**asked.before, **measuring.before},
        {"edits": len(records), **asked.samples, **measuring.samples},
        {**config, "chat_date": date_of(edited.tokenizer)},
        time.perf_counter() - started,
        peak_rss_bytes(),
        {**asked.each, **measuring.each},
        asked.figures,
    )


def _generated(settings: EvalSettings) -> Generated:
    """Return which generated figures are taken."""
    protocol: ProtocolName = settings.protocol if settings.generate else "teacher"
    return Generated(protocol, settings.forms, settings.ask, settings.before, settings.kinds)


def read_dataset(dataset: str | None, data: Path | None) -> tuple[str, Sequence[Edit]]:
    """Return a dataset's name and records; a ``WiseError`` if none is named, or a record cannot be used."""
    name, records = _dataset(dataset, data)
    if records is None:
        raise SettingsError("give a --dataset, or a file of records by --data")
    return name, records


def _dataset(dataset: str | None, data: Path | None) -> tuple[str, Sequence[Edit] | None]:
    """Return the name of what is measured, and its records; ``None`` for the memory's own edits."""
    if dataset in BENCHMARKS:
        return str(dataset), read_edits(data or fetch_benchmark(str(dataset)))
    if data is not None:
        return dataset or data.stem, read_edits(data)
    if dataset is None:
        return "edits", None
    if not Path(dataset).exists():
        raise SettingsError(f"--dataset {dataset}: neither a file nor one of {', '.join(BENCHMARKS)}")
    return Path(dataset).stem, read_edits(Path(dataset))


def _selected(records: Sequence[Edit], memory_edits: Sequence[Edit], limit: int | None) -> list[Edit]:
    """Return the first ``limit`` edits with their consequences; without a limit those the memory holds, or all."""
    if limit is not None:
        first = [edit for edit in records if edit.consequence_of is None][:limit]
        ids = {edit.id for edit in first}
        return [edit for edit in records if edit.id in ids or edit.consequence_of in ids]
    known = {(edit.prompt, edit.target) for edit in memory_edits}
    return [edit for edit in records if (edit.prompt, edit.target) in known] or list(records)


def _consequences(records: Sequence[Edit], memory_edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Return what follows from the records: as they state it themselves, and what the memory holds beside."""
    ids = {edit.id for edit in records}
    return (
        *consequences_in(records),
        *(edit for edit in memory_edits if edit.consequence_of in ids and edit.id not in ids),
    )


def memory_numbers(manifest: Manifest) -> dict[tuple[str, str], int]:
    """Return which memory holds each edit, by its prompt and target; in a lookup every edit is one."""
    if manifest.memory.by_edit:
        return {(edit.prompt, edit.target): number for number, edit in enumerate(manifest.edits)}
    owner = {name: number for number, owned in enumerate(manifest.owners) for name in owned}
    return {(edit.prompt, edit.target): owner[edit.id] for edit in manifest.edits if edit.id in owner}


def _holders(records: Sequence[Edit], numbers: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return the memory that holds the edit which a prompt or rephrase asks for, by that and the answer."""
    known_edits = [edit for edit in records if (edit.prompt, edit.target) in numbers]
    return {
        (text, edit.answer): numbers[edit.prompt, edit.target]
        for edit in known_edits
        for text in (*edit.rephrases, edit.prompt)
    }
