"""``wise bench``: methods × numbers of edits on one model and dataset, in one table; resumable."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wisecli.bench.bench_context import BenchContext
from wisecli.bench.edit_stream import counts_in, digest_of, stream_of
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import METHODS
from wisecli.bench.reporting.html_tables import markdown
from wisecli.bench.reporting.report_page import RESULTS, write_page
from wisecli.bench.result_row import ResultRow
from wisecli.bench.result_store import WORK, ResultRows, kept_date, require_same
from wisecli.bench.runner import rows_of
from wisecli.bench.wise_methods import WISE_METHODS
from wisecli.commands.measure.evaluate import read_dataset
from wisecli.config import BenchSettings, LoadOptions
from wisecli.environment import versions
from wisecli.errors import SettingsError
from wisecli.evaluation.forms import named_forms
from wisecli.evaluation.kinds import named_kinds
from wisecli.io.checkpoint import write_json
from wisecli.models.model_files import find_model
from wisecli.models.prompts.chat_template import today
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class BenchReport:
    """All rows: a method at a number of edits each, or the reason why it cannot run."""

    dataset: str
    rows: tuple[ResultRow, ...]
    config: dict[str, Any]
    output: Path

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints: ``results.<method>.<edits>`` with the keys of ``wise eval``."""
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
    load: LoadOptions = LoadOptions(),
    force: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> BenchReport:
    """Edit a model by every method with the first records of a dataset, and measure it after each number of edits.

    Several datasets take turns, a record each; all their edits stand in one memory, and there are figures of each, too.
    Rows that are there already are not measured again, and a method that was broken off goes on where it was. One that
    could not run is tried again.

    Args:
        data: the datasets' files, in the order of their names, instead of fetching them.
        train: records to learn from; by default those of the dataset that no number of edits reaches.

    Raises:
        SettingsError: a method or a form is unknown, there are too few records, or not as many files as datasets.
        ChangedInputError: the output holds rows of another model, dataset, train split or seed.
    """
    load_methods()
    named_forms(settings.forms)
    named_kinds(settings.kinds)
    names, counts = settings.methods.split(","), counts_in(settings.counts)
    if unknown := [name for name in names if name not in (*WISE_METHODS, *METHODS)]:
        raise SettingsError(
            f"--methods: {unknown[0]!r} is unknown; known are {', '.join([*WISE_METHODS, *sorted(METHODS)])}"
        )
    stream = stream_of(settings.dataset, data, counts[-1])
    learnt = stream.rest if train is None else read_dataset(None, train)[1]
    about = {"model": model, "dataset": stream.dataset, "seed": settings.seed, "generate": settings.generate}
    about |= {"protocol": settings.protocol, "forms": settings.forms, "kinds": settings.kinds, "ask": settings.ask}
    about |= {
        "dtype": load.dtype,
        "records": stream.digest,
        "train": "the rest" if train is None else digest_of(learnt),
    }
    load = replace(load, date=kept_date(output) or today())
    about["chat_date"] = load.date
    require_same(output, about, force=force)
    kept = ResultRows(output / "rows.jsonl")
    directory = find_model(model, on_progress=on_progress)
    context = BenchContext(directory, stream.tested, stream.domains, learnt, settings, load, output / WORK, on_progress)
    # Ours load a model of their own, beside which the rivals' would be counted as theirs.
    for name in sorted(names, key=lambda name: name not in WISE_METHODS):
        missing = [count for count in counts if not _measured(kept, {"method": name, "edits": count})]
        for row in rows_of(context, name, counts, missing):
            kept.add(row)
    rows = tuple(kept[{"method": name, "edits": count}] for count in counts for name in names)
    report = BenchReport(stream.dataset, rows, {**asdict(settings), **about}, output)
    _write(report)
    return report


def _measured(kept: ResultRows, point: dict[str, Any]) -> bool:
    """Return whether a row has figures; a method that could not run may be able to by now."""
    return point in kept and "cannot" not in kept[point]["figures"]


def _write(report: BenchReport) -> None:
    """Write ``results.json``, ``results.md`` and ``report.html`` beside the rows."""
    write_json(report.output / RESULTS, report.as_json())
    (report.output / "results.md").write_text(markdown(report.rows), encoding="utf-8")
    write_page(report.output)
