"""``wise bench``: methods × numbers of edits on one model and dataset, in one table; resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jsonlines

from wisecli.baselines import load_methods
from wisecli.baselines.protocol import METHODS
from wisecli.bases import find_model
from wisecli.bench_report import markdown, page
from wisecli.config import BenchSettings
from wisecli.edits import Edit
from wisecli.errors import ChangedInputError, SettingsError
from wisecli.events import Watcher, ignore
from wisecli.pipeline.contestants import OURS, Course, Row
from wisecli.pipeline.evaluate import read_dataset
from wisecli.pipeline.reports import versions
from wisecli.storage import read_json, sha256_json, write_json


@dataclass(frozen=True)
class BenchReport:
    """All rows: a method at a number of edits each, or the reason why it cannot run."""

    dataset: str
    rows: tuple[Row, ...]
    config: dict[str, Any]
    output: Path

    def as_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints: ``results.<method>.<edits>`` with the keys of ``wise eval``."""
        results: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            results.setdefault(row["method"], {})[str(row["edits"])] = row["figures"]
        return {"results": results, "config": self.config, "versions": versions()}


def bench(
    model: str,
    output: Path,
    settings: BenchSettings,
    *,
    data: Sequence[Path] = (),
    train: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    watch: Watcher = ignore,
) -> BenchReport:
    """Edit a model by every method with the first records of a dataset, and measure it after each number of edits.

    Several datasets take turns, a record each; all their edits stand in one memory, and there are figures of each, too.
    Rows that are there already are not measured again.

    Args:
        data: the datasets' files, in the order of their names, instead of fetching them.
        train: records to learn from; by default those of the dataset that no number of edits reaches.

    Raises:
        SettingsError: a method is unknown, there are too few records, or not as many files as datasets.
        ChangedInputError: the output holds rows of another model, dataset or seed.
    """
    load_methods()
    names, counts = settings.methods.split(","), _counts(settings.counts)
    if unknown := [name for name in names if name not in (*OURS, *METHODS)]:
        raise SettingsError(f"--methods: {unknown[0]!r} is unknown; known are {', '.join([*OURS, *sorted(METHODS)])}")
    sources = _sources(settings.dataset, data)
    dataset, records = ",".join(name for name, _ in sources), [edit for _, edits in sources for edit in edits]
    if counts[-1] > len(records):
        raise SettingsError(f"--edits {counts[-1]}: {dataset} has only {len(records)} records")
    turns = _turns(sources)
    tested, domains = [edit for _, edit in turns[: counts[-1]]], [name for name, _ in turns[: counts[-1]]]
    learnt = [edit for _, edit in turns[counts[-1] :]] if train is None else read_dataset(None, train)[1]
    about = {"model": model, "dataset": dataset, "seed": settings.seed, "generate": settings.generate, "dtype": dtype}
    about["records"] = sha256_json([record.as_dict() for record in records])[:12]
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    kept = _Rows(output, about, force=force)
    course = Course(find_model(model, watch=watch), tested, domains, learnt, settings, options, output / "work", watch)
    for name in names:
        for row in course.rows(name, [count for count in counts if (name, count) not in kept.found]):
            kept.add(row)
    rows = tuple(kept.found[name, count] for count in counts for name in names)
    report = BenchReport(dataset, rows, {**asdict(settings), **about}, output)
    _write(report)
    return report


def _sources(dataset: str | None, data: Sequence[Path]) -> list[tuple[str, Sequence[Edit]]]:
    """Names and records of the datasets.

    Raises:
        SettingsError: there are more names than one, and not as many files.
    """
    names = dataset.split(",") if dataset else [None] * max(1, len(data))
    if data and len(data) != len(names):
        raise SettingsError(f"--data is given {len(data)} times for {len(names)} datasets; give one file for each")
    files: Sequence[Path | None] = data or [None] * len(names)
    return [read_dataset(name, file) for name, file in zip(names, files, strict=True)]


def _turns(sources: Sequence[tuple[str, Sequence[Edit]]]) -> list[tuple[str, Edit]]:
    """Records with their dataset's name, a record of each in turn while it has any; ids bear the names of several."""
    if len(sources) > 1:
        sources = [(name, [replace(edit, id=f"{name}/{edit.id}") for edit in edits]) for name, edits in sources]
    named = [[(name, edit) for edit in edits] for name, edits in sources]
    return [one for turn in zip_longest(*named) for one in turn if one is not None]


def _write(report: BenchReport) -> None:
    """``results.json``, ``results.md`` and ``report.html`` beside the rows."""
    write_json(report.output / "results.json", report.as_json())
    (report.output / "results.md").write_text(markdown(report.rows), encoding="utf-8")
    about = json.dumps({"config": report.config, "versions": versions()}, indent=2)
    title = f"Editing {report.config['model']} with {report.dataset}"
    (report.output / "report.html").write_text(page(report.rows, title=title, about=about), encoding="utf-8")


def _counts(text: str) -> list[int]:
    """Numbers of edits with commas between, in rising order.

    Raises:
        SettingsError: they are none.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise SettingsError(f"--edits must be numbers with commas between, as 10,100, not {text!r}")
    return counts


class _Rows:
    """Rows that are kept in ``rows.jsonl``, beside what they are about."""

    def __init__(self, output: Path, about: Mapping[str, Any], *, force: bool) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.file, place = output / "rows.jsonl", output / "about.json"
        before = read_json(place) if place.is_file() else about
        other = [name for name, now in about.items() if before.get(name) != now]
        changes = [f"{name} was {before.get(name)}, now {about[name]}" for name in other]
        if changes and not force:
            raise ChangedInputError(output, changes)
        if changes:
            self.file.unlink(missing_ok=True)
        write_json(place, dict(about))
        self.found: dict[tuple[str, int], Row] = {}
        if self.file.is_file():
            with jsonlines.open(self.file) as reader:
                self.found = {(row["method"], row["edits"]): row for row in reader}

    def add(self, row: Row) -> None:
        """Keep one more."""
        self.found[row["method"], row["edits"]] = row
        with jsonlines.open(self.file, "a") as writer:
            writer.write(row)
