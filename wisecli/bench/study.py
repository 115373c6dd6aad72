"""``wise bench --study``: the paper's analyses on one model and dataset, each with its picture; resumable."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wisecli.bench.edit_stream import counts_in, stream_of
from wisecli.bench.reporting.html_tables import Section
from wisecli.bench.reporting.report_page import study_file, write_page
from wisecli.bench.result_row import ResultRow
from wisecli.bench.result_store import WORK, ResultRows, kept_date, require_same
from wisecli.bench.studies import load_studies
from wisecli.bench.studies.base import STUDIES, Point, section
from wisecli.bench.studies.study_context import StudyContext
from wisecli.config import BenchSettings, LoadOptions
from wisecli.edits.text import markdown_table
from wisecli.environment import versions
from wisecli.errors import SettingsError
from wisecli.io.checkpoint import write_json
from wisecli.models.model_files import find_model
from wisecli.models.prompts.chat_template import today
from wisecli.progress import Event, ProgressCallback, ignore_progress

# Settings of `wise bench` that are the methods' alone.
_OF_METHODS = ("methods", "protocol", "forms", "kinds", "ask", "generate", "resamples")


@dataclass(frozen=True)
class StudyReport:
    """The rows of every study that was asked for: its points, with ``figures``."""

    rows: dict[str, list[ResultRow]]
    config: dict[str, Any]
    output: Path

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        return {"studies": self.rows, "config": self.config, "versions": versions()}

    def sections(self) -> list[Section]:
        """Return each study's table, without a picture."""
        return [section(STUDIES[name], rows, drawn=False) for name, rows in self.rows.items()]


def study(
    model: str,
    output: Path,
    settings: BenchSettings,
    *,
    data: Sequence[Path] = (),
    load: LoadOptions = LoadOptions(),
    force: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> StudyReport:
    """Make the studies that ``settings.study`` names, with the first records of a dataset.

    Rows that are there already are not measured again, and shards that several rows need are written once.

    Args:
        data: the datasets' files, in the order of their names, instead of fetching them.

    Raises:
        SettingsError: a study is unknown, its settings allow of no row, or there are too few records.
        ChangedInputError: the output holds rows of another model, dataset or seed.
    """
    names, counts = _names(settings.study or ""), counts_in(settings.counts)
    stream = stream_of(settings.dataset, data, counts[-1])
    load = replace(load, date=kept_date(output) or today())
    context = StudyContext(
        find_model(model, on_progress=on_progress), stream.tested, counts, settings, load, output / WORK, on_progress
    )
    points = {name: STUDIES[name].points(context) for name in names}
    about = {
        "model": model,
        "dataset": stream.dataset,
        "seed": settings.seed,
        "dtype": load.dtype,
        "records": stream.digest,
        "chat_date": load.date,
    }
    require_same(output, about, force=force)
    config = {**{name: value for name, value in asdict(settings).items() if name not in _OF_METHODS}, **about}
    report = StudyReport({name: _measured(name, context, points[name], output) for name in names}, config, output)
    _write(report)
    return report


def _names(text: str) -> list[str]:
    """Return the names of studies with commas between.

    Raises:
        SettingsError: one is unknown.
    """
    load_studies()
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in STUDIES]:
        raise SettingsError(f"--study: {unknown[0]!r} is unknown; known are {', '.join(sorted(STUDIES))}")
    return names


def _measured(name: str, context: StudyContext, points: Sequence[Point], output: Path) -> list[ResultRow]:
    """Return a row for every point; those that are new are kept as soon as they are measured."""
    kept = ResultRows(output / f"study-{name}.jsonl")
    for point in points:
        if point not in kept:
            context.on_progress(Event(f"{name}: {', '.join(f'{setting} {value}' for setting, value in point.items())}"))
            kept.add({**point, "figures": STUDIES[name].measure(context, point)})
    return [kept[point] for point in points]


def _write(report: StudyReport) -> None:
    """Write ``study-….json`` and ``study-….md`` for each study, and ``report.html`` with all that are there."""
    for (name, rows), shown in zip(report.rows.items(), report.sections(), strict=True):
        write_json(study_file(report.output, name), {"rows": rows, "config": report.config, "versions": versions()})
        (report.output / f"study-{name}.md").write_text(markdown_table(shown.heads, shown.cells), encoding="utf-8")
    write_page(report.output)
